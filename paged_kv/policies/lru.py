"""Least recently attended first."""

from __future__ import annotations

import torch

from paged_kv.core.options import number
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region


class LRU(ScoringPolicy):
    """Entries that some query used most recently, as a page cache would keep them.

    A query uses an entry when it gives it more than `threshold` of its attention in at least one
    head of the group; writing an entry counts as its first use. No paper: the classical rule of
    caches, applied to attention.
    """

    options = {"threshold": number(0.01, 0, 1, "attention above which an entry counts as used")}
    reads = frozenset({"scores"})

    def accumulate(
        self, scores: torch.Tensor, probabilities: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Position of the last query that used the entry; float32 is exact below 2**24."""
        used = probabilities.amax(-3) > self.settings["threshold"]
        last = torch.where(used, positions[:, None, :, None].to(scores.dtype), 0).amax(-2)
        return torch.maximum(scores, last)

    def score(self, region: Region) -> torch.Tensor:
        """The last use; of equal ones the older entry goes first."""
        return torch.maximum(region.scores, region.positions.to(region.scores.dtype))
