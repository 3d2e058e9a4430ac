"""What each policy scores, one KV head at a time; a part of policy_definitions.

A function of this file that `scores` decorates defines the policy of the same name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import query_files
from policy_heads import Head, free_slots, observed, scores

from paged_kv.policies.calibrated_attention import AGEING, YOUTH  # numbers only

SHIPPED = Path(__file__).parent.parent.parent / "paged_kv" / "policies" / "learned_smollm2.npz"


def newest_first(head: Head, values: np.ndarray, share: float) -> np.ndarray:
    """The newest share of what stays cannot lose against anything else."""
    count = round((len(head.positions) - head.num_losers) * share)
    newest = sorted(range(len(head.positions)), key=lambda slot: -head.positions[slot])[:count]
    return np.array([1e30 if s in newest else values[s] for s in range(len(values))])


@scores()
def attention(head: Head, options: dict) -> np.ndarray:
    return observed(head, options["observation_window"], options["aggregation"])


def fading(scores: Any, given: Any, position: int, options: dict) -> np.ndarray:
    """Of what an entry had, a query leaves half after so many queries; then it gives its own."""
    return scores * 0.5 ** (1 / options["half_life"]) + sum(given)


@scores(accumulate=fading)
def calibrated_attention(head: Head, options: dict) -> np.ndarray:
    """Rated by the file, less with age, plus what was seen; both as shares."""
    fades = options["fading"] == "on"
    expected = [rating(head, slot, options["statistics"]) for slot in range(len(head.positions))]
    for slot, position in enumerate(head.positions):
        expected[slot] /= (head.num_tokens - position + YOUTH) ** AGEING
    free = free_slots("calibrated_attention", head, options)
    total = np.zeros(len(head.positions))
    for measure in (expected, head.scores) if fades else (expected,):
        whole = sum(measure[slot] for slot in free)
        for slot in free:
            total[slot] += measure[slot] / whole if whole else 0.0
    return total


def rating(head: Head, slot: int, file: str) -> float:
    """Mean over the query heads of the attention that the file expects, at most 1; the value."""
    key, parts = head.keys[slot], query_files.read(file)
    before = np.linalg.inv(rotation(head, head.positions[slot], len(key))) @ key
    linear, quadratic, normaliser = (
        parts[name][head.layer, head.head] for name in ("linear", "quadratic", "normaliser")
    )
    attention = 0.0
    for member in range(len(linear)):
        logarithm = linear[member] @ before + quadratic[member] @ before**2 - normaliser[member]
        attention += min(1.0, math.exp(logarithm)) / len(linear)
    return attention * np.linalg.norm(head.values[slot])


@scores()
def expected_attention(head: Head, options: dict) -> np.ndarray:
    """Gaussian queries, turned by the mean rotation; see the paper's equations."""
    window = options["observation_window"]
    present = [i for i, p in enumerate(head.query_positions) if p >= 0]
    present = [i for i in present if head.num_tokens - 1 - head.query_positions[i] < window]
    later = [i for i in present if head.query_positions[i] >= head.num_sinks]
    used = later or present
    size = head.keys.shape[1]
    ahead = [head.num_tokens + i for i in range(options["n_future"])]
    mean_rotation = sum(rotation(head, position, size) for position in ahead) / len(ahead)
    inside = [s for s, position in enumerate(head.positions) if position >= head.num_sinks]
    total = np.zeros(len(head.positions))
    for states in head.queries:
        raw = [np.linalg.inv(rotation(head, head.query_positions[i], size)) @ states[i]
               for i in used]  # fmt: skip
        mu = sum(raw) / len(raw)
        cov = sum(np.outer(q - mu, q - mu) for q in raw) / len(raw)
        mu, cov = mean_rotation @ mu, mean_rotation @ cov @ mean_rotation.T
        logits = [mu @ head.keys[s] * head.scale
                  + head.scale**2 / 2 * (head.keys[s] @ cov @ head.keys[s])
                  for s in inside]  # fmt: skip
        exps = [math.exp(logit - max(logits)) for logit in logits]
        for slot, value in zip(inside, exps, strict=True):
            total[slot] += value / sum(exps) / len(head.queries)
    norms = np.array([np.linalg.norm(value) for value in head.values])
    return (total + options["epsilon"]) * norms


def rotation(head: Head, position: int, size: int) -> np.ndarray:
    """RoPE at a position as a matrix [d, d]."""
    half = head.cos.shape[1]
    matrix = np.eye(size)
    for i in range(half):
        a, b = (i, i + half) if head.neox else (2 * i, 2 * i + 1)
        cos, sin = head.cos[position, i], head.sin[position, i]
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
    return matrix


def attention_so_far(scores: Any, given: Any, position: int, options: dict) -> np.ndarray:
    """Plus what each query head of the group gives."""
    return scores + sum(given)


@scores(accumulate=attention_so_far)
def h2o(head: Head, options: dict) -> np.ndarray:
    share = options["recent_ratio"] / (options["heavy_ratio"] + options["recent_ratio"])
    return newest_first(head, head.scores, share)


@scores()
def hybrid(head: Head, options: dict) -> np.ndarray:
    return newest_first(head, attention(head, options), 1 - options["split_ratio"])


@scores()
def keydiff(head: Head, options: dict) -> np.ndarray:
    units = [key / np.linalg.norm(key) for key in head.keys]
    anchor = sum(units) / len(units)
    return np.array([-(unit @ anchor) / np.linalg.norm(anchor) for unit in units])


@scores()
def knorm(head: Head, options: dict) -> np.ndarray:
    return np.array([-np.linalg.norm(key) for key in head.keys])


@scores()
def learned(head: Head, options: dict) -> np.ndarray:
    net = np.load(options["weights"] or SHIPPED)
    mean = sum(head.keys) / len(head.keys)
    ratings = []
    for key, value, position in zip(head.keys, head.values, head.positions, strict=True):
        norm = np.linalg.norm(key)
        x = [
            math.log(1 + head.num_tokens - position),
            math.log(norm),
            math.log(np.linalg.norm(value)),
            1 - key @ mean / norm / np.linalg.norm(mean),
            head.layer / int(net["num_layers"]),
        ]
        x = (np.array(x) - net["mean"]) / net["std"]
        ratings.append(float((np.tanh(x @ net["w1"] + net["b1"]) @ net["w2"] + net["b2"])[0]))
    return np.array(ratings)


def last_use(scores: Any, given: Any, position: int, options: dict) -> np.ndarray:
    """A query uses what one of its heads gives more than the threshold."""
    used = np.max(given, 0) > options["threshold"]
    return np.where(used, np.maximum(scores, position), scores)


@scores(accumulate=last_use)
def lru(head: Head, options: dict) -> np.ndarray:
    return np.array([max(s, p) for s, p in zip(head.scores, head.positions, strict=True)])


@scores()
def past_future(head: Head, options: dict) -> np.ndarray:
    """Both measures as shares of what the entries that may go have."""
    free = free_slots("past_future", head, options)
    total = np.zeros(len(head.positions))
    for measure in (
        observed(head, options["observation_window"], options["aggregation"]),
        expected_attention(head, options),
    ):
        whole = sum(measure[slot] for slot in free)
        for slot in free:
            total[slot] += measure[slot] / whole if whole else 0.0
    return total


@scores()
def random(head: Head, options: dict) -> np.ndarray:
    """splitmix64, started anew from the last state plus the next number."""

    def hashed(position: int) -> int:
        z = options["seed"] % 2**64
        for part in (head.layer, head.head, position):
            z = (z + part + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            z = z ^ (z >> 31)
        return z >> 40

    return np.array([float(hashed(position)) for position in head.positions])


def window_too(head: Head, options: dict) -> tuple[int, int]:
    return head.num_sinks, max(head.recent_window, options["observation_window"])


@scores(protects=window_too)
def snapkv(head: Head, options: dict) -> np.ndarray:
    """The window itself counts as 0, and so do neighbours past the ends."""
    window, kernel = options["observation_window"], options["kernel_size"]
    total = observed(head, window, options["aggregation"])
    order = sorted(range(len(total)), key=lambda slot: head.positions[slot])
    in_order = [total[s] * (head.positions[s] < head.num_tokens - window) for s in order]
    pooled = np.zeros(len(total))
    for place, slot in enumerate(order):
        first = place - (kernel - 1) // 2
        pooled[slot] = sum(in_order[max(first, 0) : first + kernel]) / kernel
    return pooled


@scores()
def streaming(head: Head, options: dict) -> np.ndarray:
    return np.array(head.positions, dtype=float)


@scores()
def tova(head: Head, options: dict) -> np.ndarray:
    heads = head.siblings if options["shared_heads"] else [head]
    return sum(observed(each, 1) / len(each.queries) for each in heads) / len(heads)


@scores(protects=lambda head, options: (0, head.recent_window))
def window(head: Head, options: dict) -> np.ndarray:
    return np.array(head.positions, dtype=float)
