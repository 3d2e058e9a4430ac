"""Layers with equal budgets, which compact together."""

from __future__ import annotations

import numpy as np

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import Schedule
from paged_kv.hf.allocator import Int64s
from paged_kv.plan import make_plan


def layer_groups(
    compression: CompressionConfig, page_size: int, layers: Int64s, num_layers: int
) -> dict[Schedule | None, Int64s]:
    """Places in `layers` by schedule; None for layers that keep everything.

    Args:
        compression: what each layer keeps.
        page_size: entries per page.
        layers: int64, indices in the model of the layers that a cache holds.
        num_layers: of the model.

    Raises:
        ValueError: the budgets do not fit the model or the page size.
    """
    if not compression.enabled:
        return {None: np.arange(len(layers))}
    plan = make_plan(compression, page_size, num_layers, layers.tolist())
    schedules = [plan.schedule(layer) for layer in layers.tolist()]
    return {
        one: np.array([place for place, other in enumerate(schedules) if other == one])
        for one in dict.fromkeys(schedules)
    }
