"""One sequence that spills, twice: in an engine's region and tier, and in plain lists."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from policy_definitions import DEFINITIONS, Head
from policy_heads import is_free
from spill_definition import Entry, Spilling, exchange, importance_of

from paged_kv.policies.region import ObservedQueries, Region
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore

LAYERS, HEADS, GROUP, SIZE, VALUE_SIZE = 2, 2, 2, 16, 8

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
        max_survivors=BUDGET,
        layers=torch.arange(LAYERS),
        heads=torch.arange(HEADS),
        **fields,
        queries=ObservedQueries(states, asked, 0.5),
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
