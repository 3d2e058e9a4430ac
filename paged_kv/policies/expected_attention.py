"""Attention that future queries will give, from the statistics of the last ones."""

from __future__ import annotations

import torch

from paged_kv.core.options import integer, number
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Queries, Region


class ExpectedAttention(ScoringPolicy):
    """Entries that future queries are expected to attend to, times the norm of their values.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution" (2510.00636). Queries before RoPE are taken as Gaussian, with the mean and
    covariance of the last `observation_window`, turned by the mean rotation of the next `n_future`
    positions. A softcap and the logits of attention sinks are left out, as in the paper.
    """

    options = {
        "n_future": integer(512, 1),
        "epsilon": number(0.0, 0, 1),
        "observation_window": integer(128, 2),
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
        scale = region.queries.scale
        keys = region.keys.where(region.valid[..., None], 0)[:, :, :, None]  # [..., 1, m, head_dim]
        logits = (keys @ mean[..., None]).squeeze(-1) * scale
        logits = logits + _squares(deviations, keys) * (scale**2 / 2)
        sink = region.positions < self.num_sink_tokens
        out = (sink | ~region.valid)[:, :, :, None]
        logits = logits.masked_fill(out, torch.finfo(logits.dtype).min)
        expected = logits.softmax(-1).mean(-2)
        epsilon: float = self.settings["epsilon"]
        scores: torch.Tensor = (expected + epsilon) * region.values.norm(dim=-1)
        return scores

    def _statistics(self, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        """Of future queries: mean [..., group, head_dim], and D [..., group, window, head_dim].

        The covariance is D^T D.
        """
        queries: Queries = region.queries
        rotary = region.rotary
        assert rotary is not None, "the policy reads rotary"
        used = self._used(queries.positions)[:, None, None, :, None].to(queries.states.dtype)
        count = used.sum(-2).clamp_min(1)
        states = rotary.rotate(queries.states, queries.positions[:, None, None], back=True) * used
        mean = states.sum(-2) / count
        deviations = (states - mean[..., None, :]) * used / count[..., None, :].sqrt()
        # R is linear: turned deviations have the turned covariance.
        cos, sin = rotary.mean(region.num_tokens, self.settings["n_future"])
        cos, sin = cos[:, None, None], sin[:, None, None]
        turned = rotary.turn(deviations, cos[..., None, :], sin[..., None, :])
        return rotary.turn(mean, cos, sin), turned

    def _used(self, positions: torch.Tensor) -> torch.Tensor:
        """bool [events, window]: queries that exist; those of sinks only where all are."""
        after_sinks = positions >= self.num_sink_tokens
        return torch.where(after_sinks.any(-1, keepdim=True), after_sinks, positions >= 0)


def _squares(deviations: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """k^T D^T D k of each key: [..., group, m]; by D k or by D^T D, whichever is less work.

    Args:
        deviations: D, [..., group, window, head_dim].
        keys: [..., 1, m, head_dim].
    """
    window, size = deviations.shape[-2:]
    num_keys = keys.shape[-2]
    if window * num_keys <= size * (window + num_keys):
        return (deviations @ keys.transpose(-1, -2)).square().sum(-2)
    covariance = deviations.transpose(-1, -2) @ deviations
    return ((keys @ covariance) * keys).sum(-1)
