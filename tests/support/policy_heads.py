"""One KV head as plain arrays, and how the definition of a policy is written and found.

A definition is one function, decorated with `scores` or `compacts`; its name is the policy's. The
decorator takes what else there is to say: what the policy never drops, how it adds up attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from paged_kv import registry


@dataclass
class Head:
    """One KV head of one layer of one sequence; arrays of float64.

    Args:
        positions: of each entry, m of them, in any order.
        num_tokens: seen so far.
        num_losers: entries that must go.
        num_sinks: first tokens, never dropped.
        recent_window: newest tokens, never dropped.
        layer: index in the model.
        head: index of the KV head in the model.
        keys: [m, d], after RoPE.
        values: [m, d].
        weights: [m], tokens that an entry stands for.
        scores: [m], accumulated.
        queries: [group, window, d], after RoPE.
        query_positions: [window], -1 for none.
        scale: factor of the logits.
        softcap: of the logits, 0 for none.
        sinks: [group], logits of attention sinks.
        cos: [positions, rotary_dim / 2], of RoPE.
        sin: the same.
        neox: see paged_kv.kernels.rotary.
        siblings: all KV heads of the layer that are in the same process.
    """

    positions: list[int]
    num_tokens: int
    num_losers: int
    num_sinks: int
    recent_window: int
    layer: int = 0
    head: int = 0
    keys: Any = None
    values: Any = None
    weights: Any = None
    scores: Any = None
    queries: Any = None
    query_positions: list[int] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Any = None
    cos: Any = None
    sin: Any = None
    neox: bool = True
    siblings: list[Head] = field(default_factory=list)


Decided = tuple[set[int], Any, Any, Any]
"""Slots of the losers; keys [m, d], values [m, d] and weights [m] of all entries from now on."""


@dataclass(frozen=True)
class Definition:
    """What a policy does to one KV head; called, it is `compact`.

    Args:
        compact: (head, options) -> Decided.
        score: (head, options) -> [m], of a policy that drops the lowest; None for all others.
        protects: (head, options) -> (first tokens, newest tokens) that it never drops.
        accumulate: (scores [m], given [group, m], position of the query, options) -> scores [m]
            after one more query, and what the query heads gave; None if no scores are kept.
    """

    compact: Callable[[Head, dict], Decided]
    score: Callable[[Head, dict], np.ndarray] | None
    protects: Callable[[Head, dict], tuple[int, int]]
    accumulate: Callable[[Any, Any, int, dict], np.ndarray] | None = None

    def __call__(self, head: Head, options: dict) -> Decided:
        return self.compact(head, options)


DEFINITIONS: dict[str, Definition] = {}
"""By the policy's name. An option that is not given has the default that the policy declares."""


def sinks_and_recent(head: Head, options: dict) -> tuple[int, int]:
    """What nearly all policies protect."""
    return head.num_sinks, head.recent_window


def scores(
    protects: Callable[[Head, dict], tuple[int, int]] = sinks_and_recent,
    accumulate: Callable[[Any, Any, int, dict], np.ndarray] | None = None,
) -> Callable:
    """Decorates (head, options) -> scores [m]: the entries with the lowest go. See Definition."""

    def register(score: Callable[[Head, dict], np.ndarray]) -> Callable:
        name = score.__name__

        def compact(head: Head, options: dict) -> Decided:
            losers = lowest(name, head, options, head.num_losers)
            return losers, head.keys, head.values, head.weights

        _register(
            name,
            Definition(
                compact,
                lambda head, options: score(head, with_defaults(name, options)),
                lambda head, options: protects(head, with_defaults(name, options)),
                accumulate,
            ),
        )
        return score

    return register


def compacts(compact: Callable[[Head, dict], Decided]) -> Callable:
    """Decorates (head, options) -> Decided: a policy that does more than drop the lowest."""
    name = compact.__name__
    definition = Definition(
        lambda head, options: compact(head, with_defaults(name, options)), None, sinks_and_recent
    )
    _register(name, definition)
    return compact


def _register(name: str, definition: Definition) -> None:
    assert name not in DEFINITIONS, f"two definitions of {name}"
    DEFINITIONS[name] = definition


def with_defaults(name: str, options: dict) -> dict:
    """The options, and the defaults of those that the policy declares and nobody gives."""
    return _defaults(name) | options


@cache
def _defaults(name: str) -> dict:
    return {key: option.default for key, option in registry.load(name).options.items()}


def selector(name: str, options: dict) -> tuple[str, dict]:
    """Whose scores count, and its options: a wrapper's inner policy, of others they themselves.

    An option that both declare is the wrapper's.
    """
    declared = _defaults(name)
    if registry.WRAPPED not in declared:
        return name, options
    others = {key: value for key, value in options.items() if key not in declared}
    return with_defaults(name, options)[registry.WRAPPED], others


def is_free(name: str, head: Head, options: dict, slot: int) -> bool:
    """Whether the policy may drop this entry."""
    num_first, num_newest = DEFINITIONS[name].protects(head, options)
    return num_first <= head.positions[slot] < head.num_tokens - num_newest


def free_slots(name: str, head: Head, options: dict) -> list[int]:
    """Those entries, oldest first."""
    slots = [s for s in range(len(head.positions)) if is_free(name, head, options, s)]
    return sorted(slots, key=lambda slot: head.positions[slot])


def lowest(
    name: str, head: Head, options: dict, count: int, spared: frozenset[int] = frozenset()
) -> set[int]:
    """The slots that go: lowest score first, then lowest position."""
    score = DEFINITIONS[name].score
    assert score is not None, f"{name} does more than drop the lowest"
    values = score(head, options)
    free = [slot for slot in free_slots(name, head, options) if slot not in spared]
    return set(sorted(free, key=lambda slot: (values[slot], head.positions[slot]))[:count])


def observed(head: Head, window: int, aggregation: str = "sum") -> np.ndarray:
    """Attention that each entry gets from the last `window` queries of the group, [m]: in all, or
    (max) from that query and query head which gives it most."""
    total = np.zeros(len(head.positions))
    for index, position in enumerate(head.query_positions):
        if not 0 <= head.num_tokens - 1 - position < window or position < 0:
            continue
        for member in range(len(head.queries)):
            given = softmax_row(head, head.queries[member, index], position, member)
            total = np.maximum(total, given) if aggregation == "max" else total + given
    return total


def softmax_row(head: Head, query: np.ndarray, position: int, member: int) -> np.ndarray:
    weights = np.zeros(len(head.positions))
    for slot, own in enumerate(head.positions):
        if own <= position:
            logit = float(query @ head.keys[slot]) * head.scale
            if head.softcap:
                logit = head.softcap * math.tanh(logit / head.softcap)
            weights[slot] = math.exp(logit)
    total = weights.sum() + (math.exp(head.sinks[member]) if head.sinks is not None else 0)
    return weights / total if total else weights
