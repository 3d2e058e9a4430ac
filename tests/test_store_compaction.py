"""Compactions of pages in any format, at both ends: survivors keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels.operands import Terms
from paged_kv.kernels.page_layout import hadamard_block, rotate
from paged_kv.policies.base import Policy
from paged_kv.policies.region import Compaction, Exchanged, Region
from paged_kv.quant import make_layout
from paged_kv.store import side_data
from paged_kv.store.compaction import compact
from paged_kv.store.entries import NativeEntries, Number
from paged_kv.store.holding import Holding
from paged_kv.store.layers import PageStore
from paged_kv.store.pages import Pages, packed_pages
from paged_kv.store.side_data import SideData

LAYERS, EVENTS, HEADS, SIZE, PAGE = 2, 2, 2, 32, 16
NUM_PAGES, LENGTHS, TAIL = 9, [60, 49], 16
TABLE = torch.tensor([[[8, 1, 6, 3], [2, 7, 4, 5]]])  # page ids, in no order


class Chooses(Policy):
    """Drops what it is told to, and changes some of the others.

    Args:
        losers: bool [layers, events, kv_heads, m].
        changed: bool, of the same shape; their keys and values become 1.5.
        is_few: whether they are told one by one.
    """

    reads = frozenset({"keys", "values"})

    def __init__(self, losers: torch.Tensor, changed: torch.Tensor, is_few: bool) -> None:
        super().__init__(0, 0)
        self.losers, self.changed, self.is_few = losers, changed, is_few

    def compact(self, region: Region) -> Compaction:
        at = region.layers
        losers, changed = self.losers[at], self.changed[at]
        if not self.is_few:
            keys, values = (
                torch.where(changed[..., None], 1.5, part) for part in (region.keys, region.values)
            )
            return Compaction(losers, keys, values, changed=changed)
        places = changed.nonzero(as_tuple=True)
        rows = torch.full((len(places[0]), SIZE), 1.5)
        return Compaction(losers, exchanged=Exchanged(places, {"keys": rows, "values": rows}))


def make_store(page_format: str, generator: torch.Generator) -> PageStore:
    """Numbers that int4 does not always give back when it encodes them again: 20, and a little."""
    layout = make_layout(page_format, torch.float32, SIZE, SIZE, PAGE)
    shape = LAYERS, NUM_PAGES, HEADS, layout.block_bytes
    pages = packed_pages(torch.zeros(shape, dtype=torch.uint8), layout)
    every = NUM_PAGES * PAGE
    layer, slot = torch.arange(LAYERS)[:, None, None], torch.arange(every)
    index = layer, slot // PAGE, torch.arange(HEADS)[:, None], slot % PAGE
    for entries in pages:
        noise = torch.randn(LAYERS, HEADS, every, SIZE, generator=generator)
        entries.store(index, rotate(20 + 0.3 * noise, hadamard_block(SIZE)))
    positions = torch.arange(every, dtype=torch.int32).view(NUM_PAGES, 1, PAGE)
    side = {"positions": positions.expand(LAYERS, NUM_PAGES, HEADS, PAGE).clone()}
    layers = torch.arange(LAYERS)
    return PageStore(pages, SideData(side), layers, layers, torch.arange(HEADS), Terms(1.0))


def bits_of(store: PageStore) -> torch.Tensor:
    """[layers, events, kv_heads, slots, bytes]: each entry's bytes and position."""
    stack, layout = store.pages.keys.stack, store.pages.keys.layout
    entries = stack[..., layout.elements][:, TABLE[0]].transpose(2, 3).flatten(3, 4)
    positions = store.side.tensors["positions"][:, TABLE[0]].transpose(2, 3).flatten(3, 4)
    return torch.cat([entries.long(), positions[..., None].long()], -1)


def holding(num_losers: list[int], tail: int) -> Holding:
    lengths, none = np.array(LENGTHS), np.zeros(EVENTS, dtype=np.int64)
    return Holding(
        layers=np.arange(LAYERS),
        pages=TABLE,
        num_tokens=lengths,
        num_entries=lengths,
        num_losers=np.array(num_losers),
        rated=none,
        tail=none + tail,
        rows=none,
        first=none,
        owners=["a", "b"],
    )


@pytest.mark.parametrize("is_few", [False, True], ids=["changed", "exchanged"])
@pytest.mark.parametrize("freed", ["head", "tail"])
@pytest.mark.parametrize("page_format", FORMATS)
def test_survivors_keep_their_bits(page_format, freed, is_few):
    generator = torch.Generator().manual_seed(1)
    store, num_losers = make_store(page_format, generator), [16, 16]
    tail = TAIL if freed == "tail" else 0
    size = TABLE.shape[-1] * PAGE
    losers = torch.zeros(LAYERS, EVENTS, HEADS, size, dtype=torch.bool)
    changed = torch.zeros_like(losers)
    for row in np.ndindex(LAYERS, EVENTS, HEADS):
        free = torch.randperm(LENGTHS[row[1]] - TAIL, generator=generator)
        losers[row][free[:16]] = True
        if row[2]:  # the other head changes nothing
            changed[row][free[16:20]] = True
    before = bits_of(store)
    compact(Chooses(losers, changed, is_few), store, holding(num_losers, tail), freed)
    after = bits_of(store)
    for row in np.ndindex(LAYERS, EVENTS, HEADS):
        length = LENGTHS[row[1]]
        first, end = (16, length) if freed == "head" else (0, length - tail - 16)
        stay = [*range(first, end), *range(length - tail, length)]
        left = sorted(map(tuple, after[row][stay].tolist()))
        kept = (~losers[row] & ~changed[row])[:length]
        wanted = [tuple(entry) for entry in before[row][:length][kept].tolist()]
        assert set(wanted) <= set(left), "a survivor has other bits"
        assert len(left) == len(wanted) + int(changed[row].sum()) == length - 16
        places = before[row][changed[row]][:, -1].tolist()
        if not is_few:  # what changed lies with its own position
            assert sorted(entry[-1] for entry in left) == sorted(
                [*(entry[-1] for entry in wanted), *places]
            )


def test_numbers_that_changed_are_read_again():
    """What a policy wrote is what the pages give back, up to their format."""
    generator = torch.Generator().manual_seed(2)
    store = make_store("native", generator)
    size = TABLE.shape[-1] * PAGE
    losers = torch.zeros(LAYERS, EVENTS, HEADS, size, dtype=torch.bool)
    losers[..., :16] = True  # all of what is freed: nothing moves
    changed = torch.zeros_like(losers)
    changed[..., 20] = True
    for is_few in (False, True):
        compact(Chooses(losers, changed, is_few), store, holding([16, 16], 0), "head")
        for entries in store.pages:
            numbers = entries.gather(torch.arange(LAYERS), TABLE)
            assert (numbers[..., 20, :] == 1.5).all()
            assert not (numbers[..., 21:49, :] == 1.5).any()


def test_side_data_is_what_policies_read():
    assert side_data.names(None) == []
    shape = 1, 3, HEADS, PAGE
    side = SideData({"positions": torch.zeros(shape, dtype=torch.int32)})
    side.reset(torch.tensor([2]), torch.tensor([5]), torch.tensor([77]))
    found = side.gather("positions", torch.tensor([0]), torch.tensor([[2, 1]]))
    assert found.shape == (1, 1, HEADS, 2 * PAGE)
    assert (found[0, 0, :, 5] == 77).all()
    assert int((found != 0).sum()) == HEADS


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (2, 1, 0, 3, 4)], ids=str)
def test_whole_pages_of_any_strides(order):
    """Pages that lie in one piece are copied as such, others entry by entry: the same numbers."""
    shape = torch.tensor([LAYERS, NUM_PAGES, HEADS, PAGE, SIZE])
    memory = torch.rand(*shape[list(order)].tolist())
    stack = memory.permute(*np.argsort(order).tolist())
    entries = NativeEntries(stack, slice(None), Number(torch.float32))
    pages = Pages(entries, entries)
    layers = torch.tensor([1, 0])
    expected = stack[layers][:, TABLE[0]].transpose(2, 3).flatten(3, 4)
    assert torch.equal(pages.keys.gather(layers, TABLE), expected)
    by_layer = torch.stack([TABLE[0], TABLE[0].flip(0)])
    expected = torch.stack([expected[0], expected[1].flip(0)])
    assert torch.equal(pages.keys.gather(layers, by_layer), expected)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([*range(15)], r"num_losers losers of each row, here \[16, 16\].* named \[15\], and 0"),
        ([*range(17)], r"named \[17\], and 0 times padding"),
        ([*range(15), 59], r"named \[15, 16\], and 4 times padding"),  # of the shorter sequence
    ],
)
def test_a_decision_that_frees_other_places_is_refused(slots, message):
    """Survivors would be lost, or what nobody wrote kept: wrong tokens, which nobody sees."""
    store = make_store("native", torch.Generator().manual_seed(3))
    losers = torch.zeros(LAYERS, EVENTS, HEADS, TABLE.shape[-1] * PAGE, dtype=torch.bool)
    losers[..., slots] = True
    chooses = Chooses(losers, torch.zeros_like(losers), is_few=True)
    before = bits_of(store)
    with pytest.raises(ValueError, match=message):
        compact(chooses, store, holding([16, 16], 0), "head")
    chooses.losers = losers[..., :40]
    with pytest.raises(ValueError, match=r"must be bool \[2, 2, 2, 64\], not .* \[2, 2, 2, 40\]"):
        compact(chooses, store, holding([16, 16], 0), "head")
    assert torch.equal(bits_of(store), before)
