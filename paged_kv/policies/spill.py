"""What another policy drops goes down a tier, and comes back when the last queries ask for it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch

from paged_kv.kernels import selection
from paged_kv.policies import spill_ranking as ranking
from paged_kv.policies.base import Policy, ScoringPolicy
from paged_kv.policies.region import Compaction, Exchanged, ObservedQueries, Region, RegionIndex
from paged_kv.policies.tier import Memo, Places, Spilled, Tier
from paged_kv.policies.wrapper import Wrapper

Tensor = torch.Tensor


class _Fetched(NamedTuple):
    """Who comes back, and in whose place; [n] each.

    Args:
        layer: int64, of the region.
        head: int64, of the region.
        place: int64, slot of the survivor that makes way, in the region.
        below: bool, whether it comes from the tier; the others this compaction would have dropped.
        slot: int64, where it lies, in the tier or in the region.
        positions: see Memo.fetched.
    """

    layer: Tensor
    head: Tensor
    place: Tensor
    below: Tensor
    slot: Tensor
    positions: Tensor


class Spill(Wrapper):
    """Lets another policy evict, and exchanges what it kept for what was dropped.

    At a compaction, entries on the tier are compared
    with the survivors by the attention that the last queries give them, in one softmax over both;
    an entry counts as much as the best of its neighbours by position, so that phrases come back as
    a whole. Pages of the tier are ranked by an upper bound of their logits, from the least and the
    largest number in each channel (Tang et al., "Quest: Query-Aware Sparsity for Efficient
    Long-Context LLM Inference", 2406.10774); the best are read.
    Per KV head the best candidate takes the place of the weakest survivor, the second best that of
    the second weakest, and so on, as long as it gets more than `threshold` times its attention; at
    most `fetch_limit`. What this very compaction drops takes part. Sinks and the recent window
    stay. Of equal entries the newer is the better one.

    How important an entry is once it is down is its logit for the mean of the last queries when it
    went: attention on a logarithmic scale, but for what all entries have in common. It takes
    nothing but the entry's own key.

    To look at the tier takes as long as some steps of decoding, and what a text is about does not
    change so quickly. So a sequence that decodes looks once in `interval` tokens; what was fetched
    stays until it looks again.

    Args:
        inner: says what goes; it merges nothing.
        fetch_limit: most entries that a compaction fetches, per layer and KV head.
        window: last queries that say what is worth fetching.
        threshold: see above.
        interval: see above; 0: every compaction looks.
    """

    reads = frozenset({"keys", "values"})

    def __init__(
        self, inner: Policy, fetch_limit: int, window: int, threshold: float, interval: int = 0
    ) -> None:
        super().__init__(inner)
        # Whole keys and values are large; only those that come or go are read.
        self.reads_partly = type(self).reads - inner.reads_wholly
        self.fetch_limit, self.window, self.threshold = fetch_limit, window, threshold
        self.interval = interval

    @property
    def observation_window(self) -> int:
        """What the inner policy and this one look at."""
        return max(self.inner.observation_window, self.window)

    def compact(self, region: Region) -> Compaction:
        """The inner policy's losers go; some survivors hold other entries from now on."""
        assert region.spilled is not None, "the engine keeps no tiers"
        memos = [tier.recall() for tier in region.spilled]
        spared = self.inner.protected(region)
        looking, losers = self._losers(region, memos, spared)
        region = _narrowed(region, self.window)
        parts = []
        for event, (tier, memo) in enumerate(zip(region.spilled or (), memos, strict=True)):
            looked = num_tokens = int(region.num_tokens[event])
            if memo is None or event in looking:
                fetched = self._ask(region, event, losers[:, event], spared[:, event])
            else:
                none = torch.zeros(0, dtype=torch.int64, device=losers.device)
                fetched = _Fetched(none, none, none, none.bool(), none, memo.fetched)
                looked = memo.looked
            tier.remember(Memo(num_tokens, looked, fetched.positions))
            below, part = _fetch(region, event, tier, fetched)
            parts.append(part)
            tier.exchange(below, _spilled(region, event, losers[:, event], fetched))
        places = [
            torch.cat(column) for column in zip(*(part.places for part in parts), strict=True)
        ]
        content = {name: torch.cat([part.content[name] for part in parts])
                   for name in parts[0].content}  # fmt: skip
        exchanged = Exchanged(cast(RegionIndex, tuple(places)), content)
        return Compaction(losers, max_changed=self.fetch_limit, exchanged=exchanged)

    def _losers(
        self, region: Region, memos: list[Memo | None], protected: Tensor
    ) -> tuple[set[int], Tensor]:
        """Events that look at their tiers, and what the inner policy drops.

        One does not if it decodes and has looked lately; what it fetched then is spared. A step of
        a prompt is told from decoding by its length, which is not that of what it drops.
        """
        inner, narrowed = self.inner, _narrowed(region, self.inner.observation_window)
        resting = {}
        evicts = isinstance(inner, ScoringPolicy) and type(inner).compact is ScoringPolicy.compact
        for event, memo in enumerate(memos if evicts else ()):
            now, num_losers = int(region.num_tokens[event]), int(region.num_losers[event])
            if memo is None or now - memo.looked >= self.interval:
                continue
            kept = _among(region.positions[:, event], memo.fetched)
            room = (~(protected[:, event] | kept)).sum(-1).amin()
            if now - memo.num_tokens == num_losers and room >= num_losers:
                resting[event] = kept
        looking = set(range(len(memos))) - set(resting)
        if not resting:
            return looking, inner.compact(narrowed).losers
        spared = torch.zeros_like(protected.expand(region.positions.shape))
        for event, kept in resting.items():
            spared[:, event] = kept
        assert isinstance(inner, ScoringPolicy)
        return looking, inner.losers(narrowed, region.num_losers[:, None], spared)

    def _ask(self, region: Region, event: int, losers: Tensor, spared: Tensor) -> _Fetched:
        """The best candidate against the weakest survivor, the second best against the next...

            offered   | losers of the region | candidates of the tier |    by attention, best first
            at stake  | free survivors |                                   by attention, least first
                        column k of both: an exchange if offered[k] > threshold * at stake[k]

        Args:
            region: see Region.
            event: the sequence.
            losers: bool [layers, kv_heads, m], all that the inner policy drops.
            spared: bool [layers, kv_heads, m].
        """
        assert region.spilled is not None
        number = ranking.CANDIDATES * self.fetch_limit
        candidates = ranking.find(region, event, region.spilled[event], number)
        # What the last queries give to each, in one softmax: float32 [layers, kv_heads, m + n].
        mass = ranking.mass(region, event, candidates)
        mass = ranking.pooled(mass, candidates.positions, spared)
        # One integer per entry that sorts by (attention, position): no two are equal.
        order = selection.sort_keys(mass, candidates.positions)
        size = losers.shape[-1]
        limit = min(self.fetch_limit, size)
        offered = torch.cat([losers, candidates.exists], -1)
        free = ~(losers | spared)
        bounds = torch.iinfo(torch.int64)
        # The best that would be dropped, or has been: int64 [layers, kv_heads, limit].
        best = order.masked_fill(~offered, bounds.min).topk(limit).indices
        # The weakest that the inner policy keeps and may lose, in the same columns.
        weakest = order[..., :size].masked_fill(~free, bounds.max)
        weakest = weakest.topk(limit, largest=False).indices
        chosen = mass.gather(-1, best) > self.threshold * mass.gather(-1, weakest)
        # topk fills up with what was masked: rows with fewer than `limit` of either.
        chosen &= offered.gather(-1, best) & free.gather(-1, weakest)
        layer, head, _ = chosen.nonzero(as_tuple=True)
        source = best[chosen]
        # Columns from m on are candidates: theirs are slots of the tier.
        below = source >= size
        slot = source.clone()
        slot[below] = candidates.slots[layer[below], head[below], source[below] - size]
        positions = candidates.positions.gather(-1, best).masked_fill(~chosen, -1)
        return _Fetched(layer, head, weakest[chosen], below, slot, positions)


def _narrowed(region: Region, window: int) -> Region:
    """The region with the last `window` of its queries; 0: none."""
    queries = region.queries
    if not window:
        return replace(region, queries=cast(ObservedQueries, None))
    if window == queries.positions.shape[-1]:
        return region
    index = queries.positions.topk(window).indices.flip(-1)
    states = queries.states.take_along_dim(index[None, :, None, None, :, None], -2)
    positions = queries.positions.gather(-1, index)
    return replace(region, queries=replace(queries, states=states, positions=positions))


def _among(positions: Tensor, wanted: Tensor) -> Tensor:
    """bool [layers, kv_heads, m]: which positions are among those wanted [layers, kv_heads, n]."""
    ordered = wanted.to(positions.device).sort(-1).values.contiguous()
    if not ordered.shape[-1]:
        return torch.zeros_like(positions, dtype=torch.bool)
    place = torch.searchsorted(ordered, positions.contiguous())
    return ordered.gather(-1, place.clamp_max(ordered.shape[-1] - 1)) == positions


def _fetch(region: Region, event: int, tier: Tier, fetched: _Fetched) -> tuple[Places, Exchanged]:
    """Places in the tier that are read, and what lies where in the region from now on."""
    layer, head, place, below, slot, _ = fetched
    spared = _at(event, layer[~below], head[~below], slot[~below])
    places = layer[below].cpu(), head[below].cpu(), slot[below].cpu()
    content = {}
    for name, entries in region.content.items():
        rows = entries.take(spared)
        content[name] = torch.cat([rows, tier.read(name, places).to(rows)])
    order = torch.cat([(~below).nonzero()[:, 0], below.nonzero()[:, 0]])
    return places, Exchanged(_at(event, layer[order], head[order], place[order]), content)


def _at(event: int, layer: Tensor, head: Tensor, slot: Tensor) -> RegionIndex:
    return layer, torch.full_like(layer, event), head, slot


def _spilled(region: Region, event: int, losers: Tensor, fetched: _Fetched) -> Spilled:
    """What goes down: losers that were not fetched, and survivors that had to make way."""
    layer, head, place, below, slot, _ = fetched
    which = losers.clone()
    which[layer, head, place] = True
    which[layer[~below], head[~below], slot[~below]] = False
    places = which.nonzero(as_tuple=True)
    layer, head, _ = places
    if len(layer) * 4 > which.numel():  # of so many, whole pages are read faster than rows
        content = {
            name: entries.of_event(event)[places] for name, entries in region.content.items()
        }
    else:
        index = _at(event, *places)
        content = {name: entries.take(index) for name, entries in region.content.items()}
    wanted = ranking.mean_query(region.queries, event)[layer, head]
    content["importance"] = torch.linalg.vecdot(content["keys"], wanted)
    return Spilled(layer * which.shape[1] + head, content)
