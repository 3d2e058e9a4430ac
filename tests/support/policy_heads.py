"""One KV head as plain arrays, and what the definitions of policies share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DEFAULTS: dict[str, dict[str, Any]] = {
    "attention": {"observation_window": 150},
    "cluster": {"mode": "evict", "num_clusters": 16, "iterations": 5, "observation_window": 32},
    "expected_attention": {"n_future": 512, "epsilon": 0.0, "observation_window": 128},
    "h2o": {"heavy_ratio": 0.5, "recent_ratio": 0.5},
    "hybrid": {"split_ratio": 0.5, "observation_window": 150},
    "keydiff": {},
    "knorm": {},
    "learned": {"weights": ""},
    "lru": {"threshold": 0.01},
    "past_future": {"n_future": 512, "epsilon": 0.0, "observation_window": 64},
    "pooling": {"mode": "mean", "window": 2, "best_by": "attention"},
    "random": {"seed": 0},
    "residual": {"of": "h2o", "mode": "mean"},
    "snapkv": {"observation_window": 32, "kernel_size": 5},
    "streaming": {},
    "tova": {"shared_heads": False},
    "value_merge": {"of": "snapkv", "threshold": 0.5},
    "window": {},
}


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


def with_defaults(name: str, options: dict) -> dict:
    return {**DEFAULTS[name], **{key: options[key] for key in DEFAULTS[name] if key in options}}


def is_free(name: str, head: Head, options: dict, slot: int) -> bool:
    """Whether the policy may drop this entry."""
    sinks, recent = head.num_sinks, head.recent_window
    if name == "window":
        sinks = 0
    if name == "snapkv":
        recent = max(recent, with_defaults(name, options)["observation_window"])
    return sinks <= head.positions[slot] < head.num_tokens - recent


def free_slots(name: str, head: Head, options: dict) -> list[int]:
    """Those entries, oldest first."""
    slots = [s for s in range(len(head.positions)) if is_free(name, head, options, s)]
    return sorted(slots, key=lambda slot: head.positions[slot])


def observed(head: Head, window: int) -> np.ndarray:
    """Attention that each entry gets from the last `window` queries: [m], summed over the group."""
    total = np.zeros(len(head.positions))
    for index, position in enumerate(head.query_positions):
        if not 0 <= head.num_tokens - 1 - position < window or position < 0:
            continue
        for member in range(len(head.queries)):
            total += softmax_row(head, head.queries[member, index], position, member)
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
