"""What spilling does to one KV head, with explicit lists; shares no code with paged_kv."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from policy_heads import Head, is_free, observed


@dataclass
class Entry:
    """What a slot holds: key and value are arrays [d]."""

    position: int
    key: Any
    value: Any
    score: float = 0.0
    importance: float = 0.0


@dataclass(frozen=True)
class Spilling:
    """The options of spill, as paged_kv.config names them."""

    fetch_limit: int
    spill_window: int
    spill_threshold: float = 1.0
    spill_budget: int = 1 << 30


def exchange(
    name: str,
    options: dict,
    head: Head,
    losers: set[int],
    tier: list[Entry],
    spilling: Spilling,
) -> tuple[list[Entry], list[Entry], int]:
    """What a compaction leaves: (entries kept, entries on the tier, how many were fetched).

    Args:
        name: of the policy that evicts.
        options: its options.
        head: before the compaction.
        losers: slots that the policy drops.
        tier: what was spilled before.
        spilling: see Spilling.
    """
    held = entries_of(head)
    for slot, importance in enumerate(importance_of(head, spilling.spill_window)):
        held[slot].importance = importance
    every = held + tier
    together = replace(
        head,
        positions=[one.position for one in every],
        keys=np.stack([one.key for one in every]),
    )
    mass = observed(together, spilling.spill_window)
    protected = [s for s in range(len(held)) if not is_free(name, head, options, s)]
    mass[protected] = 0
    in_order = sorted(range(len(every)), key=lambda place: every[place].position)
    near = [in_order[max(0, at - 8) : at + 9] for at in range(len(every))]
    mass = {place: max(mass[near[at]]) for at, place in enumerate(in_order)}

    def rank(place: int) -> tuple[float, int]:
        return mass[place], every[place].position

    candidates = sorted([*losers, *range(len(held), len(every))], key=rank, reverse=True)
    survivors = [slot for slot in range(len(held)) if slot not in losers]
    weakest = sorted((s for s in survivors if is_free(name, head, options, s)), key=rank)
    swaps = []
    for pair in zip(candidates[: spilling.fetch_limit], weakest, strict=False):
        if mass[pair[0]] > spilling.spill_threshold * mass[pair[1]]:
            swaps.append(pair)
    fetched, gone = {pair[0] for pair in swaps}, {pair[1] for pair in swaps}
    kept = [every[place] for place in [*survivors, *fetched] if place not in gone]
    below = [every[place] for place in [*candidates, *gone] if place not in fetched]
    below.sort(key=lambda one: (one.importance, one.position), reverse=True)
    return kept, below[: spilling.spill_budget], len(swaps)


def importance_of(head: Head, window: int) -> list[float]:
    """Logits of the keys for the mean of the last queries."""
    newest = sorted(range(len(head.query_positions)), key=lambda at: head.query_positions[at])
    real = [at for at in newest[-window:] if head.query_positions[at] >= 0]
    mean = head.queries[:, real].reshape(-1, head.queries.shape[-1]).mean(0)
    return [float(key @ mean * head.scale) for key in head.keys]


def entries_of(head: Head) -> list[Entry]:
    """What the slots of a head hold."""
    scores = np.zeros(len(head.positions)) if head.scores is None else head.scores
    rows = zip(head.positions, head.keys, head.values, scores, strict=True)
    return [Entry(position, key, value, float(score)) for position, key, value, score in rows]
