"""Layers with equal budgets and page formats, which compact together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import Schedule
from paged_kv.hf.allocator import Int64s
from paged_kv.plan import make_plan


class Group(NamedTuple):
    """Layers that compact together.

    Args:
        schedule: how much they keep; None: everything.
        layers: int64, indices among the layers of the cache.
    """

    schedule: Schedule | None
    layers: Int64s


def layer_groups(
    compression: CompressionConfig,
    page_size: int,
    layers: Int64s,
    num_layers: int,
    formats: Sequence[str],
) -> list[Group]:
    """The groups of a cache's layers.

    Args:
        compression: what each layer keeps.
        page_size: entries per page.
        layers: int64, indices in the model of the layers that a cache holds.
        num_layers: of the model.
        formats: page format of each of `layers`.

    Raises:
        ValueError: the budgets do not fit the model or the page size.
    """
    schedules: list[Schedule | None] = [None] * len(layers)
    if compression.enabled:
        plan = make_plan(compression, page_size, num_layers, layers.tolist())
        schedules = [plan.schedule(layer) for layer in layers.tolist()]
    kinds = list(zip(schedules, formats, strict=True))
    return [
        Group(kind[0], np.array([place for place, other in enumerate(kinds) if other == kind]))
        for kind in dict.fromkeys(kinds)
    ]
