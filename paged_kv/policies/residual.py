"""One entry that stands for everything dropped."""

from __future__ import annotations

import torch

from paged_kv.core.options import choice, text
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Compaction, Region
from paged_kv.policies.wrapper import Wrapper


class Residual(Wrapper):
    """What another policy drops adds up in one entry per KV head.

    After Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for
    Efficient LLM Inference" (2402.09398), whose state of constant size is learned; here it is a
    running mean. The first compaction drops one entry more than asked; the newest of those turns
    into the residual entry, which is known from then on by its weight: it alone stands for more
    than one token. mode mean: the mean of all keys and of all values dropped; sum: their sums
    (large: meant for experiments with few dropped entries).

    Not what the option `residual_pages` is about: those are the newest pages, kept as they were
    computed beside quantized ones. Here the residual is what is left of the entries that went.
    """

    options = {
        "of": text("h2o", "the policy that picks the survivors"),
        "mode": choice("mean", "sum", help="what the residual entry has of all that went"),
    }
    reads = frozenset({"keys", "values", "weights"})
    merges = True
    inner: ScoringPolicy

    def compact(self, region: Region) -> Compaction:
        """The losers and the residual entry become the residual entry."""
        # The residual entry of each head, if there is one by now: bool [..., m] and [...].
        residual = region.weights > 1
        exists = residual.any(-1)
        # The first time, one entry more must go, to become it; it does not count as a loser.
        num_losers = region.num_losers[:, None]
        count = torch.where(exists | (num_losers == 0), num_losers, num_losers + 1)
        dropped = self.inner.losers(region, count, residual)
        newest = region.positions.masked_fill(~dropped, -1).argmax(-1, keepdim=True)
        newest_dropped = torch.zeros_like(dropped).scatter_(-1, newest, True) & dropped
        carrier = torch.where(exists[..., None], residual, newest_dropped)
        carrier = carrier & (num_losers > 0)[..., None]  # where nothing goes nothing changes
        folded = dropped | carrier

        # What the carrier takes of each entry, [..., m]: a mean by tokens, or all of it.
        weights = region.weights * folded
        total = weights.sum(-1, keepdim=True)
        if self.settings["mode"] == "mean":
            factors = weights / total.clamp_min(1)
        else:
            factors = folded.to(weights.dtype)
        factors, into = factors[..., None, :], carrier[..., None]  # [..., 1, m], [..., m, 1]
        return Compaction(
            losers=dropped & ~carrier,
            keys=torch.where(into, factors @ self._clean(region, region.keys), region.keys),
            values=torch.where(into, factors @ self._clean(region, region.values), region.values),
            weights=torch.where(carrier, total, region.weights),
            changed=carrier,
        )

    def _clean(self, region: Region, entries: torch.Tensor) -> torch.Tensor:
        """Entries [..., m, head_dim] with 0 for padding, which may hold anything."""
        return entries.where(region.valid[..., None], 0)
