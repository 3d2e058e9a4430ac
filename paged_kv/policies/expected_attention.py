"""Attention that future queries will give, from the statistics of the last ones."""

from __future__ import annotations

import torch

from paged_kv.core.options import MOST_OBSERVED, integer, number
from paged_kv.kernels.reference import expected_probabilities
from paged_kv.kernels.rotary import compose
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import ObservedQueries, Region


class ExpectedAttention(ScoringPolicy):
    """Entries that future queries are expected to attend to, times the norm of their values.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution" (2510.00636). Queries before RoPE are taken as Gaussian, with the mean and
    covariance of the last `observation_window`, turned by the mean rotation of the next `n_future`
    positions. A softcap and the logits of attention sinks are left out, as in the paper.
    """

    options = {
        "n_future": integer(512, 1, help="positions ahead that are averaged over"),
        "epsilon": number(
            0.0, 0, 1, "added to the attention, which the norm of the value multiplies"
        ),
        "observation_window": integer(
            128, 2, MOST_OBSERVED, "last queries, from which those to come are expected"
        ),
    }
    reads = frozenset({"keys", "values", "rotary"})

    @property
    def observation_window(self) -> int:
        """The queries that the statistics are made of."""
        window: int = self.settings["observation_window"]
        return window

    def score(self, region: Region) -> torch.Tensor:
        """(expected attention, averaged over the group, + epsilon) * norm of the value."""
        mean, deviations = self._statistics(region)
        keys = region.keys.where(region.valid[..., None], 0)  # padding may be NaN
        # Sinks stay in any case, and would take most of the softmax from all others.
        hidden = (region.positions < self.num_sink_tokens) | ~region.valid
        scale = region.queries.scale
        expected = expected_probabilities(mean, deviations, keys, hidden, scale)
        epsilon: float = self.settings["epsilon"]
        scores: torch.Tensor = (expected + epsilon) * region.values.norm(dim=-1)
        return scores

    def _statistics(self, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        """Of future queries: mean [..., group, d], and D [..., group, window, d].

        The covariance is D^T D.
        """
        queries: ObservedQueries = region.queries
        rotary = region.rotary
        assert rotary is not None, "the policy reads rotary"
        # From each query's position back, and ahead by the mean rotation: one linear turn.
        ahead = rotary.mean(region.num_tokens[:, None], self.settings["n_future"])
        # cos and sin: [events, window, rotary_dim / 2], the same in all layers and heads.
        cos, sin = compose(rotary.at(queries.positions, back=True), ahead)
        states = rotary.turn(queries.states, cos[:, None, None], sin[:, None, None])
        # [events, 1, 1, window, 1], against states [layers, events, kv_heads, group, window, d].
        used = self._used(queries.positions)[:, None, None, :, None].to(states.dtype)
        count = used.sum(-2, keepdim=True).clamp_min(1)
        mean = (states * used).sum(-2, keepdim=True) / count
        # The sum of squares over `count`: each factor has a root of it. Unused queries are 0.
        deviations = (states - mean) * (used / count.sqrt())
        return mean.squeeze(-2), deviations

    def _used(self, positions: torch.Tensor) -> torch.Tensor:
        """bool [events, window]: queries that exist; those of sinks only where all are."""
        after_sinks = positions >= self.num_sink_tokens
        return torch.where(after_sinks.any(-1, keepdim=True), after_sinks, positions >= 0)
