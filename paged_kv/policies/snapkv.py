"""Attention of the last queries, pooled over neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from paged_kv.core.options import MOST_OBSERVED, integer
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import AGGREGATION, Region


class SnapKV(ScoringPolicy):
    """Entries that the last queries attend to, together with their neighbours.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (2404.14469). The
    observation window is kept too. Neighbours are the entries next to each other by position.
    """

    options = {
        "observation_window": integer(
            32, 1, MOST_OBSERVED, "last queries that are looked at; their entries stay"
        ),
        "kernel_size": integer(5, 1, help="neighbours that attention is averaged over"),
        "aggregation": AGGREGATION,
    }
    reads = frozenset({"keys"})

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(num_sink_tokens, recent_window, options)
        self.recent_window = max(recent_window, self.observation_window)

    @property
    def observation_window(self) -> int:
        """The last queries."""
        window: int = self.settings["observation_window"]
        return window

    def score(self, region: Region) -> torch.Tensor:
        """Attention aggregated over the window and the group, then averaged over neighbours."""
        total = region.aggregated_attention(self.settings["aggregation"])
        outside = region.positions < (region.num_tokens - self.observation_window)[:, None, None]
        order = region.positions.argsort(-1)
        in_order = (total * outside).gather(-1, order)
        kernel = self.settings["kernel_size"]
        padded = F.pad(in_order, ((kernel - 1) // 2, kernel // 2))
        pooled = padded.unfold(-1, kernel, 1).mean(-1)
        return torch.empty_like(pooled).scatter_(-1, order, pooled)
