"""The reference loop with spill, for vLLM: who is exchanged, and what shares a page, is recorded.

What is exchanged is decided here, in float64, from what the loop has itself in its lists. Two
entries may have attention that float32 cannot tell apart; then the loop follows the engine. Which
spilled entries share a page, and thereby a summary, is the engine's matter, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import engines
import numpy as np
import torch
from engines import Tokens
from policy_heads import Head, is_free
from policy_loop import PolicySequence, recorded_losers
from pressure_starts import loop_arguments, recorded_starts
from reference_check import check_output
from reference_loop import Chunk, Rule

TIE = 1e-4  # relative, of attention summed over a window: logits are 3e-5 off
PAGE = 32  # spilled entries that have one summary
NEIGHBOURS = 8  # on each side
CANDIDATES = 4  # entries looked at, for each that may be fetched


@dataclass
class Exchange:
    """What the engine did in one KV head; positions.

    Args:
        pages: of the tier before.
        fetched: entries that came back.
        displaced: survivors that made way.
    """

    pages: list[list[int]]
    fetched: set[int]
    displaced: set[int]


@dataclass
class Entry:
    """A spilled entry."""

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor
    importance: float


@dataclass
class Window:
    """The last queries, times the scale of the logits: [group, window, d], and their positions."""

    states: np.ndarray
    positions: np.ndarray


Exchanges = dict[tuple[int, int], list[Exchange]]  # (tokens, layer) -> by KV head


class RecordedSpill(PolicySequence):
    """The cache of one sequence under a policy with spill.

    Args:
        exchanges: what the engine did.
        given: see PolicySequence.
    """

    def __init__(self, exchanges: Exchanges, *given: Any) -> None:
        self.exchanges = exchanges
        self.num_fetched = self.num_lost = self.num_ranked = 0
        super().__init__(*given)

    def clear(self) -> None:
        super().clear()
        heads = range(self.num_heads)
        self.tiers: list[list[dict[int, Entry]]] = [[{} for _ in heads] for _ in self.held]

    def _compact(self, layer: int, num_losers: int) -> None:
        heads = [self._head(layer, head, num_losers) for head in range(self.num_heads)]
        before = self.keys[layer], self.values[layer], self.scores[layer]
        super()._compact(layer, num_losers)
        for head, region in enumerate(heads):
            own = {
                position: Entry(*(part[head, slot] for part in before), 0.0)
                for slot, position in enumerate(region.positions)
            }
            self._exchange(layer, head, region, own)

    def _exchange(self, layer: int, head: int, region: Head, own: dict[int, Entry]) -> None:
        engine = self.exchanges[self.num_tokens, layer][head]
        losers = self.dropped[self.num_tokens, layer][head]
        tier = self.tiers[layer][head]
        assert sorted(tier) == sorted(p for page in engine.pages for p in page)
        window = self._window(region)
        candidates = [p for page in self._best_pages(window, engine.pages, tier) for p in page]
        entries = {**own, **{position: tier[position] for position in candidates}}
        slots = enumerate(region.positions)
        free = [p for slot, p in slots if is_free(self.name, region, self.config, slot)]
        mass = attention(window, entries) | dict.fromkeys(set(own) - set(free), 0.0)
        mass = of_neighbours(mass)
        mean = window.states[:, window.positions >= 0].mean((0, 1))
        for position in own:
            own[position].importance = float(own[position].key.double().numpy() @ mean)
        survivors = [position for position in free if position not in losers]
        self._follow(engine, *self._choose(mass, survivors, [*losers, *candidates]), mass)

        for position in losers | engine.displaced:
            tier[position] = own[position]
        back = [(position, tier.pop(position)) for position in sorted(engine.fetched)]
        places = {int(p): slot for slot, p in enumerate(self.held[layer][head])}
        for displaced, (position, entry) in zip(sorted(engine.displaced), back, strict=True):
            slot = places[displaced]
            self.held[layer][head, slot] = position
            self.keys[layer][head, slot], self.values[layer][head, slot] = entry.key, entry.value
            self.scores[layer][head, slot] = entry.score
        self.num_fetched += len(back)
        while len(tier) > self.config.get("spill_budget", 8192):
            del tier[min(tier, key=lambda position: (tier[position].importance, position))]
            self.num_lost += 1

    def _window(self, region: Head) -> Window:
        size = self.config.get("spill_window", 32)
        recent = [i for i, p in enumerate(region.query_positions) if region.num_tokens - p <= size]
        positions = np.array(region.query_positions)[recent]
        return Window(region.queries[:, recent] * region.scale, positions)

    def _best_pages(
        self, window: Window, pages: list[list[int]], tier: dict[int, Entry]
    ) -> list[list[int]]:
        wanted = -(-CANDIDATES * self.config.get("fetch_limit", 64) // PAGE)
        if len(pages) <= wanted:
            return pages
        self.num_ranked += 1
        keys = [np.stack([tier[p].key.double().numpy() for p in page]) for page in pages]
        states = window.states[..., None, :]
        least, largest = (np.stack([f(page, 0) for page in keys]) for f in (np.min, np.max))
        logits = np.maximum(states * least, states * largest).sum(-1)  # [group, window, pages]
        order = np.argsort(-softmax(logits).sum((0, 1)), kind="stable")
        return [pages[index] for index in order[:wanted]]

    def _choose(
        self, mass: dict[int, float], survivors: list[int], candidates: list[int]
    ) -> tuple[set[int], set[int]]:
        """Positions that are fetched, and that make way."""
        weakest = sorted((mass[p], p) for p in survivors)
        best = sorted(((mass[p], p) for p in candidates), reverse=True)
        pairs = list(zip(best, weakest, strict=False))[: self.config.get("fetch_limit", 64)]
        threshold = self.config.get("spill_threshold", 1.0)
        won = [(new, old) for new, old in pairs if new[0] > threshold * old[0]]
        return {new[1] for new, _ in won}, {old[1] for _, old in won}

    def _follow(
        self, engine: Exchange, fetched: set[int], displaced: set[int], mass: dict[int, float]
    ) -> None:
        """What the engine did differently must be a tie."""
        if engine.fetched == fetched and engine.displaced == displaced:
            return
        self.num_ties += 1
        threshold = self.config.get("spill_threshold", 1.0)
        values = [mass[position] for position in engine.fetched ^ fetched]
        values += [threshold * mass[position] for position in engine.displaced ^ displaced]
        span = max(values) - min(values)
        assert span <= TIE * max(1e-3, *values), (
            f"at {self.num_tokens} tokens the engine fetched {sorted(engine.fetched - fetched)}, "
            f"not {sorted(fetched - engine.fetched)}: {sorted(values)} are no tie"
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(window: Window, entries: dict[int, Entry]) -> dict[int, float]:
    """What each entry gets, by position."""
    positions = np.array(list(entries))
    keys = np.stack([entry.key.double().numpy() for entry in entries.values()])
    logits = window.states @ keys.T
    logits[:, positions[None] > window.positions[:, None]] = -np.inf
    return dict(zip(positions.tolist(), softmax(logits).sum((0, 1)).tolist(), strict=True))


def of_neighbours(mass: dict[int, float]) -> dict[int, float]:
    """Each as much as the best of its neighbours, and itself."""
    order = sorted(mass)
    return {
        position: max(mass[p] for p in order[max(0, rank - NEIGHBOURS) : rank + NEIGHBOURS + 1])
        for rank, position in enumerate(order)
    }


@contextmanager
def recorded_exchanges(llm: Any) -> Iterator[dict[str, Exchanges]]:
    """What each compaction of the engine fetches, by request."""
    result: dict[str, Exchanges] = defaultdict(dict)
    compactor = engines.worker(llm).compactor
    policy, note = compactor.policy, compactor._note
    tiers_of: dict[int, list[torch.Tensor]] = {}  # before a region's compaction

    def compacting(region):
        tiers_of[id(region)] = [_positions(tier, region) for tier in region.spilled]
        return type(policy).compact(policy, region)

    def noting(holding, region, decided):
        tiers, names = tiers_of.pop(id(region)), holding.owners
        exchanged = decided.exchanged
        for event, request in enumerate(names):
            for index, layer in enumerate(region.layers.tolist()):
                pages = [tier.split(PAGE) for tier in tiers[event][index]]
                heads = [Exchange([page.tolist() for page in own], set(), set()) for own in pages]
                result[request][int(region.num_tokens[event]), layer] = heads
        old, new = region.positions[exchanged.places], exchanged.content["positions"]
        for *place, before, after in zip(*exchanged.places, old, new, strict=True):
            index, event, head, _ = map(int, place)
            key = int(region.num_tokens[event]), int(region.layers[index])
            exchange = result[names[event]][key][head]
            exchange.displaced.add(int(before))
            exchange.fetched.add(int(after))
        note(holding, region, decided)

    compactor._note, policy.compact = noting, compacting
    try:
        yield result
    finally:
        compactor._note = note
        del policy.compact


def _positions(tier: Any, region: Any) -> torch.Tensor:
    """[layers, kv_heads, entries] of what a tier holds."""
    sizes = region.positions.shape[0], region.positions.shape[2], tier.num_entries
    if not sizes[2]:
        return torch.zeros(sizes, dtype=torch.int64)
    return tier.read("positions", torch.meshgrid(*map(torch.arange, sizes), indexing="ij")).long()


def complete_and_check(
    llm: Any, model: Any, prompts: list[Tokens], rule: Rule, config: dict[str, Any], max_tokens: int
) -> tuple[list[list[Chunk]], list[RecordedSpill]]:
    """All prompts in one batch, each token compared with the loop. Returns chunks and loops."""
    with (
        engines.recorded_chunks(llm) as recorded,
        recorded_losers(llm) as dropped,
        recorded_exchanges(llm) as exchanges,
        recorded_starts(llm) as starts,
    ):
        outputs = engines.complete(llm, prompts, max_tokens, logprobs=0)
    differences, sequences = {}, []
    for prompt, output, (name, chunks) in zip(prompts, outputs, recorded.items(), strict=True):
        start, scored = loop_arguments(starts, name, len(prompt))
        given = model, rule, start, config, dropped[name], scored
        sequences.append(RecordedSpill(exchanges[name], *given))
        if difference := check_output(sequences[-1], prompt, output, chunks, 2e-4):
            differences[f"prompt of {len(prompt)}"] = difference
    assert not differences, differences
    return list(recorded.values()), sequences
