"""Spilling and fetching: what a compaction exchanges, and where dropped entries lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disks
import numpy as np
import pytest
import torch
from policy_definitions import DEFINITIONS, Head
from policy_heads import is_free
from spill_definition import Entry, Spilling, exchange, importance_of

from paged_kv.config import CompressionConfig
from paged_kv.policies.region import Queries, Region
from paged_kv.policies.spill_ranking import logit_bounds
from paged_kv.policies.tier import Spilled
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import PAGE_SIZE, SpillStore

LAYERS, HEADS, GROUP, SIZE, VALUE_SIZE = 2, 2, 2, 16, 8
NOTHING = (torch.zeros(0, dtype=torch.int64),) * 3
BUDGET, STEP, WINDOW = 40, 16, 12


class World:
    """One sequence with random entries, in an engine that compacts with spill, and in lists."""

    def __init__(self, policy: str, options: dict[str, Any], spilling: Spilling, space: SpillSpace):
        self.name, self.options, self.spilling = policy, options, spilling
        self.store = SpillStore((LAYERS, HEADS), (SIZE, VALUE_SIZE), torch.float32, space)
        self.fields: dict[str, torch.Tensor] = {}
        self.heads = list(itertools.product(range(LAYERS), range(HEADS)))
        self.held: dict[tuple[int, int], list[Entry]] = {at: [] for at in self.heads}
        self.tier: dict[tuple[int, int], list[Entry]] = {at: [] for at in self.heads}
        self.num_tokens = self.num_fetched = 0
        self.interval = self.num_rests = self.last = self.looked = 0
        self.fetched: dict[tuple[int, int], set[int]] = {}  # by the last look

    def add(self, count: int) -> None:
        """New tokens, with random entries."""
        shape = (LAYERS, 1, HEADS, count)
        positions = torch.arange(self.num_tokens, self.num_tokens + count).expand(shape)
        new = {
            "keys": torch.randn(*shape, SIZE),
            "values": torch.randn(*shape, VALUE_SIZE),
            "scores": torch.rand(shape),
            "positions": positions,
        }
        self.num_tokens += count
        if self.name != "h2o":
            new["scores"].zero_()  # nobody reads them
        for layer, head in self.heads:
            rows = [new[name][layer, 0, head].numpy() for name in ("keys", "values", "scores")]
            for position, key, value, score in zip(positions[0, 0, 0].tolist(), *rows, strict=True):
                self.held[layer, head].append(Entry(position, key, value, float(score)))
        old = self.fields or {name: part[:, :, :, :0] for name, part in new.items()}
        self.fields = {name: torch.cat([old[name], part], 3) for name, part in new.items()}

    def padded(self, size: int) -> dict[str, torch.Tensor]:
        """The fields, as long as the longest region."""
        padded = {}
        for name, part in self.fields.items():
            value = torch.iinfo(torch.int64).max if name == "positions" else 0
            missing = (*part.shape[:3], size - part.shape[3], *part.shape[4:])
            padded[name] = torch.cat([part, part.new_full(missing, value)], 3)
        return padded

    def expect(self, queries: torch.Tensor, query_positions: list[int]) -> None:
        """The lists after the next compaction."""
        size = len(self.held[0, 0])
        lately = bool(self.fetched) and self.num_tokens - self.looked < self.interval
        rests = lately and self.num_tokens - self.last == size - BUDGET
        self.num_rests += bool(rests)
        self.last = self.num_tokens
        if not rests:
            self.looked = self.num_tokens
        for layer, head in self.heads:
            held = self.held[layer, head]
            one = Head(
                positions=[entry.position for entry in held],
                num_tokens=self.num_tokens,
                num_losers=len(held) - BUDGET,
                num_sinks=2,
                recent_window=8,
                layer=layer,
                head=head,
                keys=np.stack([entry.key for entry in held]).astype(float),
                values=np.stack([entry.value for entry in held]).astype(float),
                scores=np.array([entry.score for entry in held]),
                queries=queries[layer, head].double().numpy(),
                query_positions=query_positions,
                scale=0.5,
            )
            if rests:
                self.rest(layer, head, one)
                continue
            losers = DEFINITIONS[self.name](one, self.options)[0]
            own = self.tier[layer, head]
            stayed = {entry.position for slot, entry in enumerate(held) if slot not in losers}
            result = exchange(self.name, self.options, one, losers, own, self.spilling)
            self.held[layer, head], self.tier[layer, head], count = result
            self.num_fetched += count
            now = {entry.position for entry in self.held[layer, head]}
            self.fetched[layer, head] = now - stayed

    def rest(self, layer: int, head: int, one: Head) -> None:
        """streaming drops the oldest, but for what was fetched; nothing comes back."""
        held = self.held[layer, head]
        importance = importance_of(one, self.spilling.spill_window)
        free = [slot for slot in range(len(held)) if is_free(self.name, one, self.options, slot)]
        free = [slot for slot in free if held[slot].position not in self.fetched[layer, head]]
        losers = sorted(free, key=lambda slot: held[slot].position)[: one.num_losers]
        for slot in losers:
            held[slot].importance = importance[slot]
            self.tier[layer, head].append(held[slot])
        self.tier[layer, head].sort(key=lambda e: (e.importance, e.position), reverse=True)
        del self.tier[layer, head][self.spilling.spill_budget :]
        self.held[layer, head] = [e for slot, e in enumerate(held) if slot not in losers]

    def check(self) -> None:
        """Engine and lists hold the same, on both tiers."""
        for layer, head in self.heads:
            rows = {name: part[layer, 0, head] for name, part in self.fields.items()}
            same(rows, self.held[layer, head])
            count = len(self.tier[layer, head])
            assert self.store.count(torch.tensor([layer])) == count
            places = torch.tensor(layer), torch.tensor(head), torch.arange(count)
            names = ["keys", "values", "positions"] + ["scores"] * (self.name == "h2o")
            rows = {name: self.store.read(name, places) for name in names}
            same(rows, self.tier[layer, head])


def same(rows: dict[str, torch.Tensor], entries: list[Entry]) -> None:
    order = rows["positions"].argsort()
    entries = sorted(entries, key=lambda entry: entry.position)
    assert rows["positions"][order].tolist() == [entry.position for entry in entries]
    for name, attribute in (("keys", "key"), ("values", "value"), ("scores", "score")):
        if name in rows and entries:
            expected = np.stack([getattr(entry, attribute) for entry in entries])
            np.testing.assert_allclose(rows[name][order].numpy(), expected, rtol=1e-6)


def compact(worlds: list[World], policy: Any, generator: torch.Generator) -> None:
    """One compaction of all, in one region; then all that it changed is compared."""
    sizes = [world.fields["positions"].shape[-1] for world in worlds]
    states = torch.randn(
        LAYERS, len(worlds), HEADS, GROUP, policy.observation_window, SIZE, generator=generator
    )
    ends = torch.tensor([world.num_tokens for world in worlds])
    window = torch.arange(policy.observation_window)
    asked = ends[:, None] - policy.observation_window + window.roll(3)  # a ring: in any order
    parts = [world.padded(max(sizes)) for world in worlds]
    fields = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    if "scores" not in policy.reads:
        fields.pop("scores")
    num_losers = torch.tensor(sizes) - BUDGET
    region = Region(
        num_tokens=ends,
        num_entries=torch.tensor(sizes),
        num_losers=num_losers,
        max_losers=int(num_losers.max()),
        layers=torch.arange(LAYERS),
        heads=torch.arange(HEADS),
        **fields,
        queries=Queries(states, asked, 0.5),
        spilled=[world.store.select(range(LAYERS)) for world in worlds],
    )
    decided = policy.compact(region).written_out(region)
    assert int(decided.changed.sum(-1).max()) <= decided.max_changed
    for event, world in enumerate(worlds):
        kept = ~decided.losers[:, event : event + 1] & region.valid[event]
        assert (kept.sum(-1) == BUDGET).all()
        for name, old in world.fields.items():
            new = getattr(decided, name)
            new = old if new is None else new[:, event : event + 1, :, : old.shape[3]]
            mask = kept[..., : old.shape[3]]
            world.fields[name] = new[mask].view(LAYERS, 1, HEADS, BUDGET, *old.shape[4:])
        world.expect(states[:, event], asked[event].tolist())
        world.check()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("streaming", {}),
    ("snapkv", {"observation_window": 6}),
    ("tova", {}),
    ("h2o", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_exchange_is_the_definition(name, options, threshold, tmp_path):
    """Two sequences, one of them longer, in one region; tiers that fill up, partly in files."""
    given = {"fetch_limit": 16, "spill_window": 9, "spill_threshold": threshold}
    config = {
        "num_sink_tokens": 2,
        "recent_window": 8,
        "budget": 100,
        "spill": True,
        "spill_interval": 0,
    }
    policy = CompressionConfig.from_dict(
        {"policy": name} | options | config | given
    ).create_policy()
    worlds = [
        World(name, options, Spilling(**given, spill_budget=60), SpillSpace(60, 20, str(tmp_path)))
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    worlds[1].add(30)
    for _ in range(5):
        for world in worlds:
            world.add(BUDGET + STEP if world.num_tokens < BUDGET else STEP)
        compact(worlds, policy, generator)
    assert min(world.num_fetched for world in worlds) > 20
    assert min(world.store.num_lost for world in worlds) > 0
    assert all(world.store.num_bytes["mmap"] for world in worlds)
    assert not list(tmp_path.iterdir()), "a file still has a name"


def test_who_decodes_looks_now_and_then():
    """What was fetched stays until the next look."""
    given = {"fetch_limit": 16, "spill_window": 9, "spill_threshold": 1.0}
    config = {"num_sink_tokens": 2, "recent_window": 8, "budget": 100, "spill": True}
    policy = CompressionConfig.from_dict(
        {"policy": "streaming", "spill_interval": 3 * STEP} | config | given
    ).create_policy()
    world = World("streaming", {}, Spilling(**given, spill_budget=60), SpillSpace(60, 60))
    world.interval = 3 * STEP
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    rests = []
    for more in (BUDGET + STEP, *[STEP] * 7):
        world.add(more)
        before = world.num_rests
        compact([world], policy, generator)
        rests.append(world.num_rests > before)
    assert rests == [False, True, True, False, True, True, False, True]
    assert world.num_fetched > 20


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
        layers=torch.arange(LAYERS),
        heads=torch.arange(HEADS),
        positions=torch.arange(3068, 3200).expand(shape),
        keys=keys,
        values=torch.randn(*shape, VALUE_SIZE),
        queries=Queries(
            asks.expand(LAYERS, 1, HEADS, GROUP, 32, SIZE), torch.full((1, 32), 3200), 1.0
        ),
        spilled=[tier],
    )
    return policy.compact(region).written_out(region)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "full"}, r"spill needs a policy that drops entries, not policy 'full'"),
        ({"policy": "value_merge"}, r"spill needs .*'value_merge' merges them"),
        ({"policy": "pyramidal+pooling"}, r"spill needs .*'pyramidal\+pooling' merges them"),
        ({"policy": "cluster", "mode": "centroid"}, r"spill needs .*'cluster' merges them"),
        ({"policy": "h2o", "spill_dir": "/nowhere"}, r"spill_dir .* '/nowhere': No such file"),
        ({"policy": "h2o", "spill_dir": "/proc"}, r"spill_dir .* '/proc'"),
        ({"policy": "h2o", "fetch_limit": 0}, r"fetch_limit must be an integer >= 1, not 0"),
        ({"policy": "h2o", "spill": False, "spill_dir": "/tmp"}, r"spill_dir '/tmp' is for spill"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_dict({"spill": True, **options})


def test_every_policy_that_drops_can_spill():
    for options in ({"policy": "cluster"}, {"policy": "random"}, {"policy": "pyramidal+learned"}):
        policy = CompressionConfig.from_dict({"spill": True, **options}).create_policy()
        assert {"keys", "values"} <= policy.reads
