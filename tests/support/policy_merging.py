"""The policies that do more than drop the lowest scores; a part of policy_definitions.

A function of this file that `compacts` decorates defines the policy of the same name.
"""

from __future__ import annotations

import numpy as np
from policy_heads import Decided, Head, compacts, free_slots, lowest, observed, selector


@compacts
def pooling(head: Head, options: dict) -> Decided:
    """Lists of nodes; a node is [slot of its newest member, key, value, weight, attention]."""
    by_attention = options["mode"] == "best" and options["best_by"] == "attention"
    seen = observed(head, 32) if by_attention else np.zeros(len(head.positions))
    slots = free_slots("pooling", head, options)
    nodes = [[s, head.keys[s], head.values[s], head.weights[s], seen[s]] for s in slots]
    left = head.num_losers
    while left:
        done: list = []
        while nodes and left:
            size = min(options["window"], left + 1, len(nodes))
            done.append(_pooled(nodes[:size], options))
            nodes = nodes[size:]
            left -= size - 1
        nodes = done + nodes
    keys, values, weights = head.keys.copy(), head.values.copy(), head.weights.copy()
    for slot, key, value, weight, _ in nodes:
        keys[slot], values[slot], weights[slot] = key, value, weight
    return set(slots) - {node[0] for node in nodes}, keys, values, weights


def _pooled(members: list, options: dict) -> list:
    slot, weight = members[-1][0], sum(m[3] for m in members)
    attention = max(m[4] for m in members)
    if options["mode"] == "mean":
        key = sum(m[1] * m[3] for m in members) / weight
        value = sum(m[2] * m[3] for m in members) / weight
    elif options["mode"] == "max":
        key = np.array([max(column) for column in zip(*(m[1] for m in members), strict=True)])
        value = np.array([max(column) for column in zip(*(m[2] for m in members), strict=True)])
    else:
        merit = [m[4] for m in members]
        if options["best_by"] == "coordinates":
            merit = [0] * len(members)
            for column in zip(*(m[1] for m in members), strict=True):
                sizes = [abs(x) for x in column]
                merit[_last_of_largest(sizes)] += 1
        best = members[_last_of_largest(merit)]
        key, value = best[1], best[2]
    return [slot, key, value, weight, attention]


def _last_of_largest(values: list) -> int:
    return max(range(len(values)), key=lambda i: (values[i], i))


@compacts
def value_merge(head: Head, options: dict) -> Decided:
    """Each loser's value to the free survivor whose key points most nearly the same way."""
    inner, inner_options = selector("value_merge", options)
    losers = lowest(inner, head, inner_options, head.num_losers)
    takers = [s for s in free_slots(inner, head, inner_options) if s not in losers]
    units = [key / np.linalg.norm(key) for key in head.keys]
    sums = [value * weight for value, weight in zip(head.values, head.weights, strict=True)]
    weights = head.weights.copy()
    for loser in losers:
        cosine, target = max((float(units[loser] @ units[t]), t) for t in takers)
        if cosine >= options["threshold"]:
            sums[target] = sums[target] + head.values[loser] * head.weights[loser]
            weights[target] += head.weights[loser]
    values = np.array([total / weight for total, weight in zip(sums, weights, strict=True)])
    return losers, head.keys, values, weights


@compacts
def residual(head: Head, options: dict) -> Decided:
    """One entry takes in all that goes; it is the one that stands for more than one token."""
    inner, inner_options = selector("residual", options)
    keys, values, weights = head.keys.copy(), head.values.copy(), head.weights.copy()
    carriers = [slot for slot, weight in enumerate(weights) if weight > 1]
    if not head.num_losers:
        return set(), keys, values, weights
    count = head.num_losers + (not carriers)
    losers = lowest(inner, head, inner_options, count, frozenset(carriers))
    if not carriers:
        carriers = [max(losers, key=lambda slot: head.positions[slot])]
    carrier = carriers[0]
    losers -= {carrier}
    folded = [carrier, *losers]
    for array in (keys, values):
        parts = [(array[s], weights[s]) for s in folded]
        if options["mode"] == "sum":
            array[carrier] = sum(part for part, _ in parts)
        else:
            array[carrier] = sum(part * w for part, w in parts) / sum(w for _, w in parts)
    weights[carrier] = sum(weights[s] for s in folded)
    return losers, keys, values, weights


@compacts
def cluster(head: Head, options: dict) -> Decided:
    """k-means, then cluster by cluster."""
    free = free_slots("cluster", head, options)
    merging = options["mode"] == "centroid"
    k = min(options["num_clusters"], len(free) - (head.num_losers if merging else 0))
    centers = [head.keys[free[i * len(free) // k]] for i in range(k)]
    for _ in range(options["iterations"]):
        nearest = [_nearest(head.keys[s], centers) for s in free]
        for c in range(k):
            members = [head.keys[s] for s, n in zip(free, nearest, strict=True) if n == c]
            if members:
                centers[c] = sum(members) / len(members)
    of = {s: _nearest(head.keys[s], centers) for s in free}
    seen = observed(head, options["observation_window"])
    members = {c: [s for s in free if of[s] == c] for c in set(of.values())}
    means = {c: sum(seen[s] for s in slots) / len(slots) for c, slots in members.items()}
    order = sorted(free, key=lambda s: (means[of[s]], of[s], seen[s], head.positions[s]))
    carrier = {c: max(slots, key=order.index) for c, slots in members.items()}
    if merging:
        order = [s for s in order if s not in carrier.values()]
    losers = set(order[: head.num_losers])
    if not merging:
        return losers, head.keys, head.values, head.weights
    keys, values, weights = head.keys.copy(), head.values.copy(), head.weights.copy()
    for c, slot in carrier.items():
        folded = [slot, *(s for s in members[c] if s in losers)]
        total = sum(head.weights[s] for s in folded)
        keys[slot] = sum(head.keys[s] * head.weights[s] for s in folded) / total
        values[slot] = sum(head.values[s] * head.weights[s] for s in folded) / total
        weights[slot] = total
    return losers, keys, values, weights


def _nearest(key: np.ndarray, centers: list) -> int:
    return min(range(len(centers)), key=lambda c: (float(np.linalg.norm(key - centers[c])), c))
