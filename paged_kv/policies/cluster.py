"""Entries of a kind leave together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from paged_kv.core.options import MOST_OBSERVED, choice, integer
from paged_kv.kernels import ops
from paged_kv.policies.base import Policy
from paged_kv.policies.entries import put, ranks, take
from paged_kv.policies.region import Compaction, Region


class Cluster(Policy):
    """Clusters of similar keys; those with the least attention go, or merge into centroids.

    After Liu et al., "ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable
    Compression" (2412.03213) and Hooper et al., "Squeezed Attention" (2411.09688), which look keys
    up by cluster; here clusters are dropped. k-means with Euclidean distances runs over the entries
    between the sinks and the recent window, starting from entries evenly spaced by position.

    mode evict: entries leave cluster by cluster, those with the lowest mean attention of the last
    queries first; within a cluster by their own attention, then the oldest first. centroid: the
    same, but the last of each cluster stays, and those that leave merge into it: means of keys and
    values, weighted by the tokens that each stands for.
    """

    options = {
        "mode": choice("evict", "centroid", help="clusters leave, or become centroids"),
        "num_clusters": integer(16, 1, help="clusters in a layer and KV head"),
        "iterations": integer(5, 1, help="rounds of k-means"),
        "observation_window": integer(32, 1, MOST_OBSERVED, "last queries that rate clusters"),
    }

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(num_sink_tokens, recent_window, options)
        self.merges = self.settings["mode"] == "centroid"
        side = {"values", "weights"} if self.merges else set()
        self.reads = frozenset({"keys"} | side)

    @property
    def observation_window(self) -> int:
        """The last queries."""
        window: int = self.settings["observation_window"]
        return window

    def compact(self, region: Region) -> Compaction:
        """In the order of clusters; carriers stay in mode centroid."""
        free = ~self.protected(region)
        num_free = free.sum(-1)
        # In mode centroid a carrier of each cluster stays: no more clusters than free survivors.
        limit = num_free - region.num_losers[:, None] if self.merges else num_free
        num_clusters = limit.clamp(1, self.settings["num_clusters"])
        member = self._members(region, free, num_clusters)
        place = _order(member, region.attention_mass, region.positions)
        # The last of each cluster in that order, the best of it, carries it: [..., clusters].
        carriers = torch.where(member, place[..., None], -1).max(-2)
        keep = ~free
        if self.merges:
            exists = carriers.values >= 0  # some clusters have no member
            keep = put(keep, carriers.indices, exists, exists)
        count, most = region.num_losers[:, None], min(region.max_losers, keep.shape[-1])
        losers = ops.lowest(place.float(), region.positions, keep, count, most)
        if self.merges:
            return self._merge(region, losers, member, carriers.indices)
        return Compaction(losers)

    def _members(
        self, region: Region, free: torch.Tensor, num_clusters: torch.Tensor
    ) -> torch.Tensor:
        """bool [..., m, clusters]: which cluster each free entry is in.

        Args:
            region: see Region.
            free: bool [..., m].
            num_clusters: int64 [...], of each row; further columns have no members.
        """
        limit = min(self.settings["num_clusters"], free.shape[-1])
        index = torch.arange(limit, device=free.device)
        # Free entries first, by position; of these every (number / clusters)-th is a first center.
        in_order = ranks(region.positions.masked_fill(~free, torch.iinfo(torch.int64).max))
        slots = in_order.argsort(-1)
        start = index * free.sum(-1, keepdim=True) // num_clusters[..., None]  # [..., clusters]
        start = start.clamp_max(free.shape[-1] - 1)  # in columns that are no cluster
        keys = region.keys.where(region.valid[..., None], 0)
        centers = take(keys, slots.gather(-1, start))  # [..., clusters, d]
        unused = index >= num_clusters[..., None]
        # One time more than the centers move: members are those of the last centers.
        for step in range(self.settings["iterations"] + 1):
            # |key - center|^2 is least where key . center - |center|^2 / 2 is largest.
            near = keys @ centers.transpose(-1, -2) - centers.square().sum(-1)[..., None, :] / 2
            near = near.masked_fill(unused[..., None, :], -torch.inf)  # [..., m, clusters]
            member = F.one_hot(near.argmax(-1), limit).bool() & free[..., None]
            if step < self.settings["iterations"]:
                size = member.sum(-2)[..., None]  # [..., clusters, 1]
                sums = member.to(keys.dtype).transpose(-1, -2) @ keys
                centers = torch.where(size > 0, sums / size.clamp_min(1), centers)
        return member

    def _merge(
        self, region: Region, losers: torch.Tensor, member: torch.Tensor, carriers: torch.Tensor
    ) -> Compaction:
        """Losers fold into the carriers of their clusters.

        Args:
            region: see Region.
            losers: bool [..., m].
            member: bool [..., m, clusters].
            carriers: int64 [..., clusters], slots.
        """
        slots = torch.arange(losers.shape[-1], device=losers.device)
        lost = member & losers[..., None]  # [..., m, clusters]
        folded = lost | (member & (slots[:, None] == carriers[..., None, :]))
        # Of what each cluster's carrier becomes, the share of each entry: [..., clusters, m].
        weights = folded * region.weights[..., None]
        total = weights.sum(-2)  # [..., clusters]
        shares = (weights / total.clamp_min(1)[..., None, :]).transpose(-1, -2)
        changed = lost.any(-2)  # [..., clusters]; a carrier that nothing folds into stays exact
        keys = region.keys.where(region.valid[..., None], 0)
        values = region.values.where(region.valid[..., None], 0)
        return Compaction(
            losers=losers,
            keys=put(region.keys, carriers, shares @ keys, changed),
            values=put(region.values, carriers, shares @ values, changed),
            weights=put(region.weights, carriers, total, changed),
            changed=put(torch.zeros_like(losers), carriers, changed, changed),
        )


def _order(member: torch.Tensor, attention: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Place of each entry by (attention of its cluster, its own attention, position).

    Args:
        member: bool [..., m, clusters].
        attention: float32 [..., m].
        positions: int64 [..., m].

    Returns:
        int64 [..., m].
    """
    inside = member.to(attention.dtype)
    mean = (attention[..., None, :] @ inside).squeeze(-2) / inside.sum(-2).clamp_min(1)
    # Clusters with equal means must not mix: by their place instead of their mean.
    cluster = _places(mean).gather(-1, member.byte().argmax(-1))  # of each entry: [..., m]
    # Stable sorts, the least important key first.
    order = positions.argsort(stable=True)
    for key in (attention, cluster):
        order = order.gather(-1, key.gather(-1, order).argsort(stable=True))
    return _inverse(order)


def _places(x: torch.Tensor) -> torch.Tensor:
    """Place of each element in its row; of equal ones the first comes first."""
    return _inverse(x.argsort(stable=True))


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """Places of the elements that are in this order."""
    return order.argsort(-1)
