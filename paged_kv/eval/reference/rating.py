"""Ratings of the reference engine: all that layers hold is rated, in every compaction anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from paged_kv.eval.reference.layer import Layer, stack
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Policy
from paged_kv.policies.region import Region
from paged_kv.policies.written import ModelFacts, Written
from paged_kv.store.query_gathering import QueryGathering


def rated(
    region: Region,
    policy: Policy,
    layers: Sequence[Layer],
    rotary: Callable[[], Rotary],
    gathering: QueryGathering | None,
) -> Region:
    """The region with ratings, if the policy reads them.

    Args:
        region: what these layers hold.
        policy: see Policy.rate.
        layers: of one sequence, alike.
        rotary: makes the model's RoPE tables.
        gathering: has statistics of the model's queries, where the policy has no file.
    """
    if "ratings" not in policy.reads:
        return region
    if gathering is not None:
        gathering.freeze()
    facts = ModelFacts(rotary(), policy.query_statistics or gathering)
    places = np.array([layer.index for layer in layers]), np.arange(len(region.heads))
    held = stack(layers, "keys"), stack(layers, "values"), region.positions
    return replace(region, ratings=policy.rate(Written(*held, *places, facts)))
