"""Heavy hitters: cumulative attention, and the newest entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paged_kv.core.options import number
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.entries import prefer_newest
from paged_kv.policies.region import Region


class H2O(ScoringPolicy):
    """Entries that got the most attention so far (heavy hitters), and the newest.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (2306.14048). Of what stays, recent_ratio / (heavy_ratio + recent_ratio) is the newest,
    rounded; the sinks and the recent window stay in any case.
    """

    options = {
        "heavy_ratio": number(0.5, 0, 1, "part of what stays: most attention so far"),
        "recent_ratio": number(0.5, 0, 1, "part of what stays: the newest"),
    }
    reads = frozenset({"scores"})

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(num_sink_tokens, recent_window, options)
        heavy, recent = self.settings["heavy_ratio"], self.settings["recent_ratio"]
        if heavy + recent <= 0:
            raise ValueError("heavy_ratio and recent_ratio must not both be 0")
        self.recent_share: float = recent / (heavy + recent)

    @property
    def score_decay(self) -> float:
        """1: attention summed over all queries so far and the group."""
        return 1.0

    def score(self, region: Region) -> torch.Tensor:
        """The sum; the newest share beats it."""
        return prefer_newest(region.scores, region, self.recent_share)
