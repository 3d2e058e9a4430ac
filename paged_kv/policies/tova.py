"""Attention of the last query."""

from __future__ import annotations

import torch

from paged_kv.core.options import boolean
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region


class TOVA(ScoringPolicy):
    """Entries that the last query attends to.

    Oren et al., "Transformers are Multi-State RNNs" (2401.06104). shared_heads is the paper's form:
    the attention is averaged over all heads of a layer, so that all of them keep the same entries;
    under tensor parallelism over the heads of the rank. Without it each KV head decides alone.
    """

    options = {"shared_heads": boolean(False, "the heads of a layer keep the same entries")}
    reads = frozenset({"keys"})

    @property
    def observation_window(self) -> int:
        """The last query."""
        return 1

    def score(self, region: Region) -> torch.Tensor:
        """Its attention, averaged over the group or over all heads."""
        scores: torch.Tensor = region.attention_mass / region.queries.states.shape[-3]
        return scores.mean(2, keepdim=True) if self.settings["shared_heads"] else scores
