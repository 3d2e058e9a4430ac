"""The layers that compact together: their pages, and all that is known of them beside the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from paged_kv.kernels.operands import Terms
from paged_kv.policies.base import Int64s
from paged_kv.policies.region import ObservedQueries
from paged_kv.store.pages import Pages
from paged_kv.store.query_ring import QueryRing
from paged_kv.store.ragged import to_device
from paged_kv.store.side_data import SideData
from paged_kv.tiers.spill_store import SpillStore

Tensor = torch.Tensor


class PageStore(NamedTuple):
    """Equal layers, counted from 0.

    Args:
        pages: keys and values.
        side: what is kept beside them.
        stack_layers: int64 [layers], which layer of `pages` each is; all 0 where they share one.
        layer_ids: int64 [layers], indices in the model; on the host.
        head_ids: int64 [kv_heads], indices in the model (a rank has some of them); on the host.
        terms: how they compute attention; sinks are float32 [layers, 1, kv_heads, group].
        ring: the last queries; None if nobody looks at them.
        ring_layers: int64 [layers], which layer of the ring each is.
        spilled: what an owner (see Holding) has spilled; None: nobody spills.
    """

    pages: Pages
    side: SideData
    stack_layers: Tensor
    layer_ids: Int64s
    head_ids: Int64s
    terms: Terms
    ring: QueryRing | None = None
    ring_layers: Tensor | None = None
    spilled: Callable[[Any], SpillStore] | None = None

    def queries(
        self, layers: Tensor, rows: Int64s, num_tokens: Int64s, first: Int64s
    ) -> ObservedQueries | None:
        """The observation windows of some sequences; None if nobody looks at them.

        Args:
            layers: int64 [layers], which.
            rows: int64 [sequences], of the ring.
            num_tokens: of each sequence.
            first: the first token of each whose query is in the ring.
        """
        if self.ring is None:
            return None
        assert self.ring_layers is not None
        device, (scale, softcap, sinks) = layers.device, self.terms
        row = to_device(rows, device)
        states = self.ring.states(self.ring_layers[layers], row, self.pages.num_heads)
        positions = to_device(self.ring.positions(num_tokens, first), device)
        return ObservedQueries(
            states, positions, scale, softcap, None if sinks is None else sinks[layers]
        )
