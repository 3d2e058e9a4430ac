"""What entries are rated by is kept beside them: who is rated when, and that it follows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paged_kv.kernels.index import region_index
from paged_kv.kernels.operands import Terms
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.written import NO_FACTS
from paged_kv.quant import make_layout
from paged_kv.store import side_data
from paged_kv.store.compaction import compact, make_region
from paged_kv.store.entries import Number
from paged_kv.store.holding import MAX_NUMBERS, Holding
from paged_kv.store.layers import PageStore
from paged_kv.store.pages import Pages, native_pages, packed_pages
from paged_kv.store.rating import rate
from paged_kv.store.side_data import SideData

LAYERS, HEADS, SIZE, PAGE, NUM_PAGES = 3, 2, 32, 16, 24
UNRATED = -7.0


class Sums(ScoringPolicy):
    """Rates by all that it is told of an entry; keeps what is rated highest."""

    reads = frozenset({"ratings"})

    def rate(self, entries) -> torch.Tensor:
        """Notes how many entries it was asked for."""
        self.asked = getattr(self, "asked", 0) + entries.positions.numel()
        layers, heads = (torch.from_numpy(part) for part in (entries.layers, entries.heads))
        whose = layers[:, None, None, None] * 100.0 + heads[:, None] * 10.0
        numbers = entries.keys.sum(-1) + 2 * entries.values.sum(-1) + 3.0 * entries.positions
        return numbers + whose

    def score(self, region) -> torch.Tensor:
        return region.ratings


class Merges(Sums):
    reads = Sums.reads | {"weights"}
    merges = True


def make_pages(page_format: str, num_layers: int, noise: torch.Tensor) -> Pages:
    """noise: [2, layers, pages, heads, page_size, size]."""
    shape = num_layers, NUM_PAGES, HEADS
    if page_format == "own":
        pages = native_pages(
            torch.zeros(*shape, PAGE, 2 * SIZE), SIZE, *[Number(torch.float32)] * 2
        )
    else:
        layout = make_layout(page_format, torch.float32, SIZE, SIZE, PAGE)
        stack = torch.zeros(*shape, layout.block_bytes, dtype=torch.uint8)
        pages = packed_pages(stack, layout)
    every = torch.arange(NUM_PAGES)[None]
    index = region_index(torch.arange(num_layers), every, HEADS, PAGE)
    for entries, part in zip(pages, noise, strict=True):
        entries.store(index, part.transpose(1, 2)[:, None])
    return pages


def make_store(page_format: str = "own", in_one: bool = False) -> PageStore:
    """Unrated entries; in_one: layers share the stack's only layer, as those of transformers."""
    generator = torch.Generator().manual_seed(0)
    stacked = 1 if in_one else LAYERS
    noise = torch.randn(2, stacked, NUM_PAGES, HEADS, PAGE, SIZE, generator=generator)
    shape = stacked, NUM_PAGES, HEADS, PAGE
    positions = torch.randint(0, 500, shape, generator=generator, dtype=torch.int32)
    side = {"positions": positions, "ratings": torch.full(shape, UNRATED)}
    layers = torch.zeros(LAYERS, dtype=torch.int64) if in_one else torch.arange(LAYERS)
    return PageStore(
        make_pages(page_format, stacked, noise),
        SideData(side),
        layers,
        np.array([2, 3, 7]),
        np.array([4, 5]),
        Terms(1.0),
    )


def make_holding(pages: torch.Tensor, entries: list[int], rated: list[int]) -> Holding:
    none = np.zeros(len(entries), dtype=np.int64)
    return Holding(
        layers=np.arange(LAYERS),
        pages=pages,
        num_tokens=np.array(entries) + 500,
        num_entries=np.array(entries),
        num_losers=none + PAGE,
        rated=np.array(rated),
        tail=none,
        rows=none,
        first=none,
        owners=list(range(len(entries))),
    )


def tables(in_one: bool, num_events: int = 3, num_columns: int = 5) -> torch.Tensor:
    """Page ids, in no order: of each event, or of each layer and event."""
    generator = torch.Generator().manual_seed(1)
    if not in_one:
        order = torch.randperm(NUM_PAGES, generator=generator)[: num_events * num_columns]
        return order.view(1, num_events, num_columns)
    order = torch.randperm(NUM_PAGES, generator=generator)[: LAYERS * num_events * 2]
    return order.view(LAYERS, num_events, 2)


def expected_of(
    policy: Sums, store: PageStore, holding: Holding, layer: int, page: int
) -> np.ndarray:
    """What one page's entries come to, [heads, page_size]: by hand."""
    stack = int(store.stack_layers[layer])
    keys, values = (
        part.gather(torch.tensor([stack]), torch.tensor([[page]]))[0, 0].double()
        for part in store.pages
    )
    positions = store.side.tensors["positions"][stack, page].double()
    ids = torch.from_numpy(store.head_ids)[:, None]
    found = keys.sum(-1) + 2 * values.sum(-1) + 3 * positions
    return (found + 100 * int(store.layer_ids[layer]) + 10 * ids).numpy()


@pytest.mark.parametrize("merges", [False, True], ids=["evicts", "merges"])
@pytest.mark.parametrize("in_one", [False, True], ids=["one table", "tables by layer"])
@pytest.mark.parametrize("page_format", ["own", "native", "int8"])
def test_what_has_come_since_is_rated(page_format, in_one, merges):
    """Sequences of different sizes: from the page with the first unrated entry to the last."""
    policy = (Merges if merges else Sums)(0, 0)
    store, pages = make_store(page_format, in_one), tables(in_one)
    sizes = ([32, 17, 20], [16, 0, 19]) if in_one else ([80, 33, 7], [49, 31, 0])
    holding = make_holding(pages, *sizes)
    rate(policy, store, holding, NO_FACTS)
    ratings, touched = store.side.tensors["ratings"], set()
    for layer, event in np.ndindex(LAYERS, 3):
        own = pages[0 if len(pages) == 1 else layer, event].tolist()
        first = 0 if merges else sizes[1][event] // PAGE
        for page in own[first : -(-sizes[0][event] // PAGE)]:
            stack = int(store.stack_layers[layer])
            expected = expected_of(policy, store, holding, layer, page)
            np.testing.assert_allclose(ratings[stack, page], expected, rtol=1e-4, atol=1e-3)
            touched.add((stack, page))
    others = torch.ones(ratings.shape[:2], dtype=torch.bool)
    for place in touched:
        others[place] = False
    assert others.any()
    assert (ratings[others] == UNRATED).all()


def test_who_has_been_rated_keeps_it():
    """In the page of the first unrated entry others are rated again, to the same; none before."""
    policy, store, pages = Sums(0, 0), make_store(), tables(False)
    rate(policy, store, make_holding(pages, [40, 33, 7], [0, 0, 0]), NO_FACTS)
    before, asked = store.side.tensors["ratings"].clone(), policy.asked
    store.side.tensors["ratings"][:, pages[0, 0, :2]] = 5.0  # the first 32 entries of the first
    rate(policy, store, make_holding(pages, [40, 33, 7], [33, 33, 7]), NO_FACTS)
    after = store.side.tensors["ratings"]
    assert (after[:, pages[0, 0, :2]] == 5.0).all()
    others = torch.ones(NUM_PAGES, dtype=torch.bool)
    others[pages[0, 0, :2]] = False
    assert torch.equal(after[:, others], before[:, others])
    assert policy.asked - asked == LAYERS * 3 * HEADS * PAGE  # a page of each


def test_shared_pages_come_to_no_harm():
    """Two sequences with the same first pages, one of them rated: as if each were alone."""
    pages = tables(False, 2)
    pages[0, 1, :3] = pages[0, 0, :3]
    together, alone = make_store(), make_store()
    rate(Sums(0, 0), together, make_holding(pages, [70, 66], [48, 0]), NO_FACTS)
    rate(Sums(0, 0), alone, make_holding(pages[:, 1:], [66], [0]), NO_FACTS)
    rate(Sums(0, 0), alone, make_holding(pages[:, :1], [70], [48]), NO_FACTS)
    for name in ("ratings", "positions"):
        assert torch.equal(together.side.tensors[name], alone.side.tensors[name])


def test_many_layers_at_once_and_few_at_a_time(monkeypatch):
    results = []
    for most in (MAX_NUMBERS, 1):
        monkeypatch.setattr("paged_kv.store.rating.MAX_NUMBERS", most)
        store = make_store("int8", in_one=True)
        rate(Sums(0, 0), store, make_holding(tables(True), [32, 17, 20], [0, 0, 0]), NO_FACTS)
        results.append(store.side.tensors["ratings"])
    assert torch.equal(*results)
    assert (results[0] != UNRATED).any()


@pytest.mark.parametrize("freed", ["head", "tail"])
def test_ratings_move_with_their_entries(freed):
    """Who stays is told by the ratings, and has its own wherever it lies now."""
    policy, store, pages = Sums(0, 0), make_store(), tables(False)
    holding = make_holding(pages, [80, 70, 65], [0, 0, 0])
    rate(policy, store, holding, NO_FACTS)
    before = make_region(policy, store, holding)
    compact(policy, store, holding, freed)
    kept = replace(holding, num_entries=holding.num_entries - PAGE, num_losers=holding.num_losers)
    if freed == "head":
        kept = replace(kept, pages=pages[..., 1:])
    after = make_region(policy, store, kept)
    for layer, event, head in np.ndindex(LAYERS, 3, HEADS):
        size = int(holding.num_entries[event])
        place = layer, event, head
        rated = before.ratings[place][:size].sort(descending=True).values
        found = after.ratings[place][: size - PAGE]
        assert torch.equal(found.sort(descending=True).values, rated[: size - PAGE])
        own = {
            (float(a), int(b))
            for a, b in zip(
                before.ratings[place][:size], before.positions[place][:size], strict=True
            )
        }
        now = zip(found, after.positions[place][: size - PAGE], strict=True)
        assert {(float(a), int(b)) for a, b in now} <= own


def test_who_writes_a_slot_leaves_its_rating():
    """Ratings are made before they are read: whoever writes a slot does not touch them."""
    policy = Sums(0, 0)
    assert side_data.names(policy) == ["positions", "ratings"]
    assert side_data.bytes_per_slot(policy) == 8
    store = make_store()
    store.side.reset(torch.tensor([3]), torch.tensor([2]), torch.tensor([77]))
    assert (store.side.tensors["positions"][:, 3, :, 2] == 77).all()
    assert (store.side.tensors["ratings"] == UNRATED).all()
