"""Compactions of the reference engine: layers that are alike, a few at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod

from paged_kv.eval.reference.layer import Alike, Layer, apply, make_region
from paged_kv.eval.reference.rating import rated
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Policy
from paged_kv.store.holding import MAX_NUMBERS
from paged_kv.store.query_gathering import QueryGathering
from paged_kv.tiers.spill_memory import SpillSpace


def compact(
    policy: Policy,
    due: Sequence[tuple[Layer, int]],
    num_tokens: int,
    rotary: Callable[[], Rotary],
    gathering: QueryGathering | None,
    space: SpillSpace | None,
) -> None:
    """Layers drop or merge what they hold too much.

    Args:
        policy: decides.
        due: layers of one sequence, and entries that each must give up, at least one.
        num_tokens: seen so far.
        rotary: makes the model's RoPE tables.
        gathering: see rated.
        space: where what is dropped is spilled to; None: nowhere.
    """
    groups: dict[Alike, list[Layer]] = defaultdict(list)
    for layer, surplus in due:
        groups[layer.alike(surplus, apart=space is not None)].append(layer)
    for alike, layers in groups.items():
        # So few that what they hold stays in a CPU's cache.
        at_once = max(1, MAX_NUMBERS // prod(alike.shape))
        for start in range(0, len(layers), at_once):
            some, num_losers = layers[start : start + at_once], alike.num_losers
            if space is not None:
                some[0].spill_to(space)  # each is alone
            seen = policy.reads, policy.observation_window, rotary
            region = make_region(some, num_tokens, num_losers, *seen)
            region = rated(region, policy, some, rotary, gathering)
            decided = policy.compact(region).checked(region, type(policy).__name__)
            apply(some, num_losers, decided.written_out(region))
