"""Attention of the last queries."""

from __future__ import annotations

import torch

from paged_kv.core.options import MOST_OBSERVED, integer
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import AGGREGATION, Region


class Attention(ScoringPolicy):
    """Entries that got the most attention from the last queries.

    Scissorhands: Liu et al., "Scissorhands: Exploiting the Persistence of Importance Hypothesis for
    LLM KV Cache Compression at Test Time" (2305.17118), with the attention itself where the paper
    counts how often it is above average.
    """

    options = {
        "observation_window": integer(150, 1, MOST_OBSERVED, "last queries that are looked at"),
        "aggregation": AGGREGATION,
    }
    reads = frozenset({"keys"})

    @property
    def observation_window(self) -> int:
        """The last queries."""
        window: int = self.settings["observation_window"]
        return window

    def score(self, region: Region) -> torch.Tensor:
        """Attention aggregated over the window and the group."""
        return region.aggregated_attention(self.settings["aggregation"])
