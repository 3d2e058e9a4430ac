"""Rows of entries are taken and put by slot, wherever in memory they lie."""

import pytest
import torch

from paged_kv.policies.entries import put, take

ROOM = torch.arange(2.0 * 3 * 9 * 4).view(2, 3, 9, 4)
ENTRIES = {
    "all": ROOM,
    "one list": ROOM[0, 0],
    "the first slots": ROOM[:, :, :7],
    "the last slots": ROOM[:, :, 2:],
    "every other slot": ROOM[:, :, ::2],
    "a part of each row": ROOM[..., 1:3],
    "every other list": ROOM[:, ::2],
    "turned": ROOM.transpose(1, 2),
    "expanded": ROOM[:, :1].expand(2, 3, 9, 4),
    "no list": ROOM[:0],
}


@pytest.fixture(params=ENTRIES)
def entries(request):
    return ENTRIES[request.param]


@pytest.fixture
def slots(entries):
    order = torch.rand(entries.shape[:-1], generator=torch.Generator().manual_seed(0)).argsort(-1)
    return order[..., :3]


def test_rows_are_those_of_the_slots(entries, slots):
    expected = entries.gather(-2, slots[..., None].expand(*slots.shape, entries.shape[-1]))
    assert torch.equal(take(entries, slots), expected)


def test_what_is_put_is_there_and_nothing_else_changes(entries, slots):
    before, valid = entries.clone(), slots % 2 == 0
    rows = -1 - torch.rand(*slots.shape, entries.shape[-1])
    made = put(entries, slots, rows, valid)
    assert torch.equal(entries, before)
    there = torch.where(valid[..., None], rows, take(before, slots))
    assert torch.equal(take(made, slots), there)
    others = torch.ones(entries.shape[:-1], dtype=torch.bool).scatter_(-1, slots, False)
    assert torch.equal(made[others], before[others])


def test_parts_of_larger_buffers_are_not_copied(monkeypatch):
    """What is taken of thousands of entries may be a few."""
    part = ROOM[:, :, :7]
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    slots = torch.zeros(2, 3, 1, dtype=torch.int64)
    assert torch.equal(take(part, slots), part[:, :, :1])
