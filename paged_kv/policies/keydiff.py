"""Keys that differ from the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region


class KeyDiff(ScoringPolicy):
    """Entries whose keys point away from the mean key.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments" (2504.15364).
    """

    reads = frozenset({"keys"})

    def score(self, region: Region) -> torch.Tensor:
        """Minus the cosine similarity to the mean of all normalised keys."""
        directions = F.normalize(region.keys, dim=-1)
        directions = directions.where(region.valid[..., None], 0)
        mean = directions.sum(-2, keepdim=True) / region.num_entries[:, None, None, None]
        return -(directions * F.normalize(mean, dim=-1)).sum(-1)
