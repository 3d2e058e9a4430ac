"""Values of what is dropped live on in the most similar survivor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from paged_kv.core.options import number, text
from paged_kv.policies.entries import put, take
from paged_kv.policies.region import Compaction, Region
from paged_kv.policies.wrapper import Wrapper

BLOCK = 128  # losers at a time: similarities of so many to all survivors are in memory together


class ValueMerge(Wrapper):
    """What another policy drops gives its values to the survivors with the most similar keys.

    Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024); Wan et al.,
    "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference" (2406.13035); Tian
    et al., "KeepKV: Achieving Periodic Lossless KV Cache Compression" (2504.09936). What they share
    is done here: a loser's value is averaged, weighted by the tokens that each stands for, into the
    survivor whose key has the highest cosine similarity, if that is at least `threshold`; else it
    is lost. Keys stay as they are. Sinks and recent entries take nothing.
    """

    options = {
        "of": text("snapkv", "the policy that picks the survivors"),
        "threshold": number(0.5, -1, 1, "least cosine of the keys for a value to be merged"),
    }
    reads = frozenset({"keys", "values", "weights"})
    merges = True

    def compact(self, region: Region) -> Compaction:
        """The inner policy's losers, some of them folded into survivors."""
        losers = self.inner.compact(region).losers
        takers = ~losers & ~self.protected(region)
        valid = region.valid[..., None]
        directions = F.normalize(region.keys.where(valid, 0), dim=-1)
        before = region.values.where(valid, 0)
        loser_slots = _first(losers, region.max_losers)
        taker_slots = _first(takers, region.max_survivors)  # n of them, fewer than m
        takes_in = take(takers, taker_slots)
        candidates = take(directions, taker_slots).transpose(-1, -2)
        own = take(region.weights, taker_slots)
        added = torch.zeros_like(own)  # tokens that each taker takes in: [..., n]
        sums = before.new_zeros(*own.shape, before.shape[-1])  # of their values, times these
        for slots in torch.split(loser_slots, BLOCK, -1):
            similarity = take(directions, slots) @ candidates  # [..., block, n]
            similarity = similarity.masked_fill(~takes_in[..., None, :], -torch.inf)
            cosine, target = similarity.max(-1)  # [..., block]
            # The cosine of opposite keys is -1 but for the last bit; no taker at all is -inf.
            near = (cosine.clamp_min(-1) >= self.settings["threshold"]) & cosine.isfinite()
            weights = take(region.weights, slots) * (take(losers, slots) & near)
            # [..., block, n]: each loser's weight in the column of its target. As a product, since
            # adding up by scatter has no fixed order on a GPU.
            share = torch.zeros_like(similarity).scatter_(-1, target[..., None], weights[..., None])
            added += share.sum(-2)
            sums += share.transpose(-1, -2) @ take(before, slots)
        grows, total = added > 0, own + added
        mean = take(before, taker_slots) * own[..., None] + sums
        mean = mean / total.clamp_min(1)[..., None]
        return Compaction(
            losers=losers,
            values=put(region.values, taker_slots, mean, grows),
            weights=put(region.weights, taker_slots, total, grows),
            changed=torch.zeros_like(losers).scatter_(-1, taker_slots, grows),
        )


def _first(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [..., count]: slots that are chosen, by slot; then others where there are fewer."""
    return chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., :count]
