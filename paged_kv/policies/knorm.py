"""Keys of small norm."""

from __future__ import annotations

import torch

from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region


class KNorm(ScoringPolicy):
    """Entries whose keys have a small norm, which tend to attract attention.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (2406.11430).
    """

    reads = frozenset({"keys"})

    def score(self, region: Region) -> torch.Tensor:
        """The smaller the norm the better."""
        norms: torch.Tensor = region.keys.norm(dim=-1)
        return -norms
