"""The tier of spilled entries: what it holds, in memory and files, and finds for queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disks
import pytest
import torch
from spill_world import GROUP, HEADS, LAYERS, SIZE, VALUE_SIZE

from paged_kv.config import CompressionConfig
from paged_kv.policies.region import ObservedQueries, Region
from paged_kv.policies.spill_ranking import logit_bounds
from paged_kv.policies.tier import Spilled
from paged_kv.tiers.page_bounds import PAGE_SIZE
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore

NOTHING = (torch.zeros(0, dtype=torch.int64),) * 3


def filled(space: SpillSpace, count: int, rounds: int = 1) -> tuple[SpillStore, dict[str, Any]]:
    """A store that got random entries, and what: [layers, kv_heads, rounds * count, ...]."""
    generator = torch.Generator().manual_seed(3)
    store = SpillStore((LAYERS, HEADS), (SIZE, VALUE_SIZE), torch.float32, space)
    given = []
    for number in range(rounds):
        shape = (LAYERS, HEADS, count)
        given.append(
            {
                "keys": torch.randn(*shape, SIZE, generator=generator),
                "values": torch.randn(*shape, VALUE_SIZE, generator=generator),
                "importance": torch.rand(shape, generator=generator),
                "positions": torch.arange(number * count, (number + 1) * count).expand(shape),
            }
        )
        content = {name: given[-1][name].flatten(0, 2) for name in ("keys", "values")}
        row = torch.arange(LAYERS * HEADS).repeat_interleave(count)
        spilled = Spilled(
            row, content | {name: given[-1][name].flatten() for name in ("importance", "positions")}
        )
        store.select(range(LAYERS)).exchange(NOTHING, spilled)
    names = ("keys", "values", "importance", "positions")
    return store, {name: torch.cat([one[name] for one in given], 2) for name in names}


def everything(store: SpillStore) -> dict[str, torch.Tensor]:
    """All that a store holds, [layers, kv_heads, n, ...], by position."""
    count = store.count(torch.arange(LAYERS))
    places = (
        torch.arange(LAYERS)[:, None, None],
        torch.arange(HEADS)[:, None],
        torch.arange(count),
    )
    order = store.read("positions", places).argsort(-1)
    places = *places[:2], order
    return {name: store.read(name, places) for name in ("keys", "values", "positions")}


def most_important(given: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The entries that a tier of `count` keeps, by position."""
    index = given["importance"].topk(count).indices.sort(-1).values
    wide = index[..., None]
    return {
        "keys": given["keys"].take_along_dim(wide, 2),
        "values": given["values"].take_along_dim(wide, 2),
        "positions": given["positions"].gather(2, index),
    }


@pytest.mark.parametrize("host", [2000, 100], ids=["host", "host and files"])
def test_what_is_given_is_held(host, tmp_path):
    store, given = filled(SpillSpace(2000, host, str(tmp_path)), 400, rounds=3)
    held = everything(store)
    assert all(torch.equal(held[name], given[name]) for name in held)
    copied = store.copy()
    store.close()
    assert (store.num_entries, store.num_bytes["mmap"]) == (0, 0)
    assert all(torch.equal(numbers, given[name]) for name, numbers in everything(copied).items())
    assert bool(copied.num_bytes["mmap"]) == (host == 100)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_full_tier_keeps_the_most_important(rounds, tmp_path):
    store, given = filled(SpillSpace(700, 100, str(tmp_path)), 1200 // rounds, rounds)
    expected = most_important(given, 700)
    assert all(torch.equal(part, expected[name]) for name, part in everything(store).items())
    assert store.num_lost == LAYERS * 500


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB: not enough for a second file of 512 entries of 4 KV heads."""
    size = LAYERS * HEADS * 512 * (SIZE + VALUE_SIZE) * 4 * 3 // 2
    with disks.mounted(tmp_path / "disk", str(size)) as disk:
        yield disk


def test_a_full_disk(small_disk, caplog):
    """What does not fit is lost, the least important first; nothing else changes."""
    store, given = filled(SpillSpace(2000, 100, str(small_disk)), 400, rounds=4)
    assert store.num_entries == LAYERS * 612
    assert store.num_lost == LAYERS * (1600 - 612)
    expected = most_important(given, 612)
    assert all(torch.equal(part, expected[name]) for name, part in everything(store).items())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"spill_dir {small_disk}" in caplog.text
    assert "No space left" in caplog.text
    store.close()


def test_summaries_are_the_bounds_of_pages():
    """After entries have gone and come, too; and they bound every product."""
    store, _ = filled(SpillSpace(500, 500), 333)
    view = store.select([1])
    heads = torch.arange(HEADS).repeat_interleave(40)
    slots = torch.cat([torch.randperm(333)[:40] for _ in range(HEADS)])
    content = {
        "keys": torch.randn(100, SIZE) * 3,
        "values": torch.randn(100, VALUE_SIZE),
        "importance": torch.rand(100),
        "positions": torch.arange(1000, 1050).repeat(HEADS),
    }
    given = Spilled(torch.arange(HEADS).repeat_interleave(50), content)
    view.exchange((torch.zeros_like(heads), heads, slots), given)
    assert view.num_entries == 343
    keys = view.read("keys", (torch.tensor(0), torch.arange(HEADS)[:, None], torch.arange(343)))
    pages = keys.split(PAGE_SIZE, 1)
    least, largest = view.summaries()
    assert torch.equal(least[0], torch.stack([page.amin(1) for page in pages], 1))
    assert torch.equal(largest[0], torch.stack([page.amax(1) for page in pages], 1))
    queries = torch.randn(HEADS, 20, SIZE)
    bounds = logit_bounds(queries, least[0], largest[0])
    best = [(queries @ page.transpose(1, 2)).amax(-1) for page in pages]
    assert (bounds >= torch.stack(best, -1) - 1e-5).all()


def test_the_best_pages_of_a_large_tier():
    """Of 3000 entries the four that the queries ask for come, with neighbours; 320 are read."""
    store = SpillStore((LAYERS, HEADS), (SIZE, VALUE_SIZE), torch.float32, SpillSpace(4000, 4000))
    keys = torch.randn(LAYERS, HEADS, 3000, SIZE, generator=torch.Generator().manual_seed(5)) / 4
    wanted = torch.tensor([7, 700, 2100, 2900])
    direction = torch.nn.functional.normalize(torch.randn(SIZE), dim=0)
    keys[:, :, wanted] += 9 * direction
    positions = torch.arange(3000).expand(LAYERS, HEADS, 3000)
    content = {
        "keys": keys.flatten(0, 2),
        "values": torch.randn(keys[..., 0].numel(), VALUE_SIZE),
        "importance": torch.rand(positions.numel()),
        "positions": positions.flatten(),
    }
    view = store.select(range(LAYERS))
    view.exchange(NOTHING, Spilled(torch.arange(LAYERS * HEADS).repeat_interleave(3000), content))
    decided = compact_random(
        view, keys=torch.randn(LAYERS, 1, HEADS, 132, SIZE) / 4, asks=direction, spill_threshold=20
    )
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        row = layer, 0, head
        fetched = set(decided.positions[row][decided.changed[row]].tolist())
        assert fetched >= set(wanted.tolist())
        assert len(fetched) <= 4 * 17
    assert store.num_entries == LAYERS * 3032


def test_equal_entries_never_change_places():
    """All keys are alike: nothing beats anything, whatever is on the tier."""
    store, _ = filled(SpillSpace(100, 100), 0)
    view = store.select(range(LAYERS))
    decided = compact_random(
        view, keys=torch.ones(LAYERS, 1, HEADS, 132, SIZE), asks=torch.ones(SIZE)
    )
    assert not decided.changed.any()
    assert store.num_entries == LAYERS * 32


def compact_random(tier: Any, keys: torch.Tensor, asks: torch.Tensor, **more: Any) -> Any:
    """One page of 132 entries goes, the oldest; all queries ask for the same."""
    config = {"policy": "streaming", "budget": 100, "recent_window": 8, "fetch_limit": 80}
    policy = CompressionConfig.from_dict(config | {"spill": True} | more).create_policy()
    shape = keys.shape[:-1]
    region = Region(
        num_tokens=torch.tensor([3200]),
        num_entries=torch.tensor([132]),
        num_losers=torch.tensor([32]),
        max_losers=32,
        max_survivors=100,
        layers=torch.arange(LAYERS),
        heads=torch.arange(HEADS),
        positions=torch.arange(3068, 3200).expand(shape),
        keys=keys,
        values=torch.randn(*shape, VALUE_SIZE),
        queries=ObservedQueries(
            asks.expand(LAYERS, 1, HEADS, GROUP, 32, SIZE), torch.full((1, 32), 3200), 1.0
        ),
        spilled=[tier],
    )
    return policy.compact(region).written_out(region)
