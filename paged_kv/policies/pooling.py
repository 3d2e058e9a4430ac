"""Old entries pooled in windows, again and again."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from paged_kv.core.options import choice, integer
from paged_kv.policies.base import Policy
from paged_kv.policies.entries import put, take
from paged_kv.policies.region import Compaction, Region


class Nodes(NamedTuple):
    """The oldest entries that may change, in the order of positions: [..., n] or [..., n, d]."""

    keys: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor  # int64; of a pooled node that of its newest member
    attention: torch.Tensor  # zeros where nobody asks


class Pooling(Policy):
    """Merges the oldest entries in windows of neighbours; drops none.

    The average pooling of the Compressive Transformer (Rae et al., 1911.05507), on KV caches. Of
    the entries between the sinks and the recent window, the oldest `window` become one entry, then
    the next ones, until enough are gone (the last window may be smaller); at the end it starts over
    with the oldest. What stays of a window lies where its newest member lay.

    mode mean: means of keys and values, weighted by the tokens that each stands for. max: the
    largest of each coordinate. best: key and value of one member; by attention the one that the
    last 32 queries give most; by coordinates the one whose key is the largest in absolute value in
    most coordinates. Of equals the newest wins, in a coordinate and in a window.
    """

    options = {
        "mode": choice("mean", "max", "best", help="what becomes of the entries in a window"),
        "window": integer(2, 2, help="entries that become one"),
        "best_by": choice("attention", "coordinates", help="what makes an entry the best"),
    }
    reads = frozenset({"keys", "values", "weights"})
    merges = True

    @property
    def observation_window(self) -> int:
        """The last queries, where attention decides."""
        by_attention = self.settings["mode"] == "best" and self.settings["best_by"] == "attention"
        return 32 if by_attention else 0

    def compact(self, region: Region) -> Compaction:
        """Rounds over the oldest entries; their number depends on shapes alone."""
        first_nodes, first_count = self._oldest(region)
        size = first_nodes.slots.shape[-1]
        nodes, count = first_nodes, first_count
        excess = region.num_losers[:, None].expand_as(first_count)
        # After r rounds a node has up to window ** r members: there can be no more than `size`.
        most_members = 1
        while most_members < size:
            if excess.device.type == "cpu" and not excess.any():  # one would wait for a GPU
                break
            nodes, count, excess = self._round(nodes, count, excess)
            if count.device.type == "cpu":  # rounds are over fewer and fewer
                nodes = _first(nodes, int(count.max()), count.ndim)
            most_members *= self.settings["window"]
        was_node, is_node = _below(first_count, first_nodes), _below(count, nodes)  # [..., n]
        weights = put(region.weights, nodes.slots, nodes.weights, is_node)
        # Losers: slots of nodes at the beginning that are no node's slot at the end.
        none = torch.zeros_like(region.valid.expand(weights.shape))
        before = put(none, first_nodes.slots, was_node, was_node)
        after = put(none, nodes.slots, is_node, is_node)
        return Compaction(
            losers=before & ~after,
            keys=put(region.keys, nodes.slots, nodes.keys, is_node),
            values=put(region.values, nodes.slots, nodes.values, is_node),
            weights=weights,
            changed=weights != region.weights,  # whoever takes in another stands for more tokens
        )

    def _oldest(self, region: Region) -> tuple[Nodes, torch.Tensor]:
        """The nodes, and how many there are: [...]. Twice the losers are all that can change."""
        protected = self.protected(region)
        # Most nodes take part where windows are pairs: one that vanishes, one that takes it in.
        limit = min(protected.shape[-1], max(1, 2 * region.max_losers))
        last = torch.iinfo(torch.int64).max
        order = region.positions.masked_fill(protected, last)
        slots = order.topk(limit, dim=-1, largest=False, sorted=True).indices  # [..., n = limit]
        attention = torch.zeros_like(region.weights)
        if self.observation_window:
            attention = region.attention_mass
        entries = (region.keys, region.values, region.weights)
        keys, values, weights = (take(part, slots) for part in entries)
        nodes = Nodes(keys, values, weights, slots, take(attention, slots))
        return nodes, (~protected).sum(-1).clamp_max(limit)

    def _round(
        self, nodes: Nodes, count: torch.Tensor, excess: torch.Tensor
    ) -> tuple[Nodes, torch.Tensor, torch.Tensor]:
        """From the oldest node to the newest, or until `excess` nodes have vanished.

        Windows of 3; 10 nodes, 5 of which are to vanish:

            index    0   1   2   3   4   5   6   7   8   9
            before | a   b   c | d   e   f | g   h | i   j       full 2, part 2, end 8
            after    abc def gh  i   j                           num_pooled 3

        Args:
            nodes: the first `count` of each row mean something.
            count: int64 [...], nodes of each row.
            excess: int64 [...], how many nodes of each row are still to vanish.

        Returns:
            The nodes, count and excess after the round.
        """
        window, size = self.settings["window"], nodes.slots.shape[-1]
        # A full window makes all of its nodes but one vanish.
        full = torch.minimum(count // window, excess // (window - 1))  # windows, [...]
        # A smaller one makes the last few vanish, or takes what is left of the row.
        part = torch.minimum(excess - full * (window - 1) + 1, count - full * window)
        part = part.masked_fill(part < 2, 0)  # a node alone is no window
        end = full * window + part  # nodes from here on stay as they are
        pooled = self._pool(nodes, end)  # [..., num_windows(, d)]
        num_windows = pooled.slots.shape[-1]
        num_pooled = full + (part > 0)
        vanished = end - num_pooled
        # The new row is taken from both, one after the other:
        #
        #   place    0 .. num_pooled .. | num_windows .. + end      .. + size
        #            pooled   nothing   | their members  as they are
        index = torch.arange(size, device=nodes.slots.device)
        unpooled = (index + vanished[..., None]).clamp_max(size - 1) + num_windows
        source = torch.where(index < num_pooled[..., None], index, unpooled)  # [..., n]
        fields = (torch.cat(parts, end.ndim) for parts in zip(pooled, nodes, strict=True))
        return (
            Nodes(*(take(field, source) for field in fields)),
            count - vanished,
            excess - vanished,
        )

    def _pool(self, nodes: Nodes, end: torch.Tensor) -> Nodes:
        """Each window of the nodes below `end` [...]; what lies past it means nothing."""
        size = nodes.slots.shape[-1]
        width = min(self.settings["window"], size)
        inside = torch.arange(size, device=end.device) < end[..., None]
        # From here on [..., windows, width(, d)]; a window's nodes are its members.
        inside = _windows(inside, width, end.ndim)
        keys, values, weights, slots, attention = (_windows(x, width, end.ndim) for x in nodes)
        # The last member inside: the newest, since nodes are in the order of positions.
        newest = (inside * torch.arange(width, device=end.device)).argmax(-1, keepdim=True)
        attention = attention.masked_fill(~inside, -1)  # so that no member outside is the best
        weights = weights * inside
        total = weights.sum(-1)  # [..., windows]
        outside = ~inside[..., None]
        if self.settings["mode"] == "mean":
            share = (weights / total.clamp_min(1)[..., None])[..., None]
            keys = (keys.masked_fill(outside, 0) * share).sum(-2)
            values = (values.masked_fill(outside, 0) * share).sum(-2)
        elif self.settings["mode"] == "max":
            keys = keys.masked_fill(outside, -torch.inf).amax(-2)
            values = values.masked_fill(outside, -torch.inf).amax(-2)
        else:
            best = self._best(keys, attention, inside)[..., None]
            keys, values = take(keys, best).squeeze(-2), take(values, best).squeeze(-2)
        slots = slots.gather(-1, newest).squeeze(-1)
        return Nodes(keys, values, total, slots, attention.amax(-1))

    def _best(
        self, keys: torch.Tensor, attention: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """Which member of each window stays, int64 [..., windows].

        Args:
            keys: [..., windows, width, d].
            attention: [..., windows, width]; -1 for members that are not inside.
            inside: bool [..., windows, width].
        """
        width = inside.shape[-1]
        merit = attention
        # argmax takes the first of equals; of a row that is turned around, the newest.
        if self.settings["best_by"] == "coordinates":
            sizes = keys.abs().masked_fill(~inside[..., None], -1)
            winners = width - 1 - sizes.flip(-2).argmax(-2)  # by coordinate: [..., windows, d]
            merit = F.one_hot(winners, width).sum(-2)  # coordinates that each member wins
        return width - 1 - merit.flip(-1).argmax(-1)


def _first(nodes: Nodes, size: int, dim: int) -> Nodes:
    """The first `size` in dimension dim."""
    return Nodes(*(part.narrow(dim, 0, size) for part in nodes))


def _below(count: torch.Tensor, nodes: Nodes) -> torch.Tensor:
    """Which nodes mean something: bool [..., n]."""
    return torch.arange(nodes.slots.shape[-1], device=count.device) < count[..., None]


def _windows(part: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Splits dimension dim in two, (windows, width), padding its end."""
    missing = -part.shape[dim] % width
    # F.pad counts from the last dimension: none of those behind dim, then its end.
    padded = F.pad(part, [0, 0] * (part.ndim - 1 - dim) + [0, missing])
    return padded.reshape(*part.shape[:dim], -1, width, *part.shape[dim + 1 :])
