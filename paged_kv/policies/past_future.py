"""Attention that entries got from the last queries and can expect from the next ones."""

from __future__ import annotations

import torch

from paged_kv.core.options import MOST_OBSERVED, integer
from paged_kv.policies.entries import share
from paged_kv.policies.expected_attention import ExpectedAttention
from paged_kv.policies.region import AGGREGATION, Region


class PastFuture(ExpectedAttention):
    """Entries that the last queries attend to, or the next ones are expected to.

    What SnapKV (2404.14469) and Expected Attention (2510.00636) measure, added up: the attention of
    the observation window, and the expected attention of the next `n_future` queries times the norm
    of the value. Each is made to sum to 1 over the entries that may go.
    """

    options = {
        **ExpectedAttention.options,
        "observation_window": integer(
            64, 2, MOST_OBSERVED, ExpectedAttention.options["observation_window"].help
        ),
        "aggregation": AGGREGATION,
    }

    def score(self, region: Region) -> torch.Tensor:
        """Share of the attention that was seen + share of what is expected."""
        free = ~self.protected(region)
        seen = region.aggregated_attention(self.settings["aggregation"])
        return share(seen, free) + share(super().score(region), free)
