"""What another policy drops goes down a tier, and comes back when the last queries ask for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from paged_kv.kernels import ops, reference
from paged_kv.policies.base import Policy, Wrapper
from paged_kv.policies.region import Compaction, Queries, Region

Tensor = torch.Tensor
Places = tuple[Tensor, Tensor, Tensor]  # int64 (layer, KV head, slot), of shapes that broadcast
Index = tuple[Tensor, Tensor, Tensor, Tensor]  # int64 (layer, event, KV head, slot) of a region

# Entries of a tier that are looked at exactly, for each that may be fetched: bounds of whole pages
# rank them well, not perfectly.
CANDIDATES = 4
# Entries on each side that are worth what an entry is worth: who asks for a phrase finds its
# beginning, and the next query, long before the next compaction, wants what follows.
NEIGHBOURS = 8
_PADDING = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Spilled:
    """Entries that go down a tier.

    Args:
        which: bool [layers, kv_heads, m], those entries of a region.
        importance: float32 [layers, kv_heads, m]; when the tier is full, the least important go.
        positions: int64 [layers, kv_heads, m].
        content: by name (keys, values; scores, if the policy reads them), what the entries of
            `which` hold, [n, head_dim] or [n], in the order of which.nonzero().
    """

    which: Tensor
    importance: Tensor
    positions: Tensor
    content: dict[str, Tensor]


class Tier(Protocol):
    """What one sequence has spilled, in the layers of a region: slots [0, num_entries).

    Layers and heads are counted from 0, as in the region. What is read lies in host memory.
    """

    @property
    def page_size(self) -> int:
        """Neighbouring slots that have one summary."""

    @property
    def num_entries(self) -> int:
        """Per layer and KV head."""

    def summaries(self) -> tuple[Tensor, Tensor]:
        """Least and largest number in each channel of a page's keys.

        [layers, kv_heads, ceil(num_entries / page_size), head_dim] each.
        """

    def read(self, name: str, places: Places) -> Tensor:
        """Keys or values [..., head_dim], positions or scores [...], of the places' shape."""

    def exchange(self, taken: Places, given: Spilled) -> None:
        """Entries leave and others come; may go on after it has returned.

        Args:
            taken: distinct places that are free from now on, [n] each, on any device.
            given: of each layer and KV head as many as are taken there, and some more: equally many
                everywhere.
        """


class Exchanged(NamedTuple):
    """What a compaction with spill decided.

    Args:
        losers: see Compaction.
        places: survivors that hold something else from now on, [n] each.
        content: what they hold, by name, [n, head_dim] or [n].
    """

    losers: Tensor
    places: Index
    content: dict[str, Tensor]


class _Candidates(NamedTuple):
    """Entries of a tier that may be worth it; all but `slots` on the region's device.

    Args:
        slots: int64 [layers, kv_heads, n], in host memory.
        exists: bool [layers, kv_heads, n]; the others are padding.
        keys: float32 [layers, kv_heads, m + n, head_dim], behind those of the region.
        positions: int64 [layers, kv_heads, m + n], the same; padding has the largest int64.
    """

    slots: Tensor
    exists: Tensor
    keys: Tensor
    positions: Tensor


class _Fetched(NamedTuple):
    """Who comes back, and in whose place; int64 [n] each.

    Args:
        layer: of the region.
        head: of the region.
        place: of the survivor that makes way, in the region.
        source: index among the entries of the region and, behind them, the candidates.
    """

    layer: Tensor
    head: Tensor
    place: Tensor
    source: Tensor


class Spill(Wrapper):
    """Lets another policy evict, and exchanges what it kept for what was dropped.

    At a compaction, entries on the tier are compared with the survivors by the attention that the
    last queries give them, in one softmax over both; an entry counts as much as the best of its
    neighbours by position, so that phrases come back as a whole. Pages of the tier are ranked by an
    upper bound of their logits, from the least and the largest number in each channel (Tang et al.,
    "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2406.10774); the best
    are read.
    Per KV head the best candidate takes the place of the weakest survivor, the second best that of
    the second weakest, and so on, as long as it gets more than `threshold` times its attention; at
    most `fetch_limit`. What this very compaction drops takes part. Sinks and the recent window
    stay. Of equal entries the newer is the better one.

    Args:
        inner: says what goes; it merges nothing.
        fetch_limit: most entries that a compaction fetches, per layer and KV head.
        window: last queries that say what is worth fetching.
        threshold: see above.
    """

    reads = frozenset({"keys", "values"})

    def __init__(self, inner: Policy, fetch_limit: int, window: int, threshold: float) -> None:
        super().__init__(inner)
        self.fetch_limit, self.window, self.threshold = fetch_limit, window, threshold

    @property
    def observation_window(self) -> int:
        """What the inner policy and this one look at."""
        return max(self.inner.observation_window, self.window)

    def compact(self, region: Region) -> Compaction:
        """The inner policy's losers go; some survivors hold other entries from now on."""
        losers, places, content = self.exchange(region)
        changed = torch.zeros_like(losers)
        changed[places] = True
        new = {name: getattr(region, name).clone() for name in content}
        for name, rows in content.items():
            new[name][places] = rows
        return Compaction(losers, **new, changed=changed, max_changed=self.fetch_limit)

    def exchange(self, region: Region) -> Exchanged:
        """What compact does, in no more numbers than it takes.

        Of the region's values only rows are read: values[layer, event, head, slot].
        """
        assert region.spilled is not None, "the engine keeps no tiers"
        losers = self.inner.compact(_narrowed(region, self.inner.observation_window)).losers
        spared = self.inner.protected(region)
        free = ~losers & ~spared
        region = _narrowed(region, self.window)
        parts = []
        for event, tier in enumerate(region.spilled or ()):
            candidates = _candidates(region, event, tier, CANDIDATES * self.fetch_limit)
            mass = _mass(region, event, candidates)
            mass = _pooled(mass, candidates.positions, spared[:, event])
            fetched = self._choose(mass, candidates, losers[:, event], free[:, event])
            below, part = _fetch(region, event, tier, candidates, fetched)
            parts.append(part)
            tier.exchange(below, _given(region, event, losers[:, event], mass, fetched))
        places = [torch.cat(of) for of in zip(*(part[0] for part in parts), strict=True)]
        names = parts[0][1]
        content = {name: torch.cat([part[1][name] for part in parts]) for name in names}
        return Exchanged(losers, (places[0], places[1], places[2], places[3]), content)

    def _choose(
        self, mass: Tensor, candidates: _Candidates, losers: Tensor, free: Tensor
    ) -> _Fetched:
        """The best candidate against the weakest survivor, and so on.

        Args:
            mass: float32 [layers, kv_heads, m + n].
            candidates: n of the tier.
            losers: bool [layers, kv_heads, m], candidates like those.
            free: bool [layers, kv_heads, m], survivors that may have to make way.
        """
        size = losers.shape[-1]
        limit = min(self.fetch_limit, size)
        order = reference.sort_keys(mass, candidates.positions)
        offered = torch.cat([losers, candidates.exists], -1)
        bounds = torch.iinfo(torch.int64)
        best = order.masked_fill(~offered, bounds.min).topk(limit).indices
        weakest = order[..., :size].masked_fill(~free, bounds.max)
        weakest = weakest.topk(limit, largest=False).indices
        chosen = mass.gather(-1, best) > self.threshold * mass.gather(-1, weakest)
        chosen &= offered.gather(-1, best) & free.gather(-1, weakest)
        layer, head, _ = chosen.nonzero(as_tuple=True)
        return _Fetched(layer, head, weakest[chosen], best[chosen])


def _narrowed(region: Region, window: int) -> Region:
    """The region with the last `window` of its queries; 0: none."""
    queries: Queries = region.queries
    if not window:
        return replace(region, queries=None)
    if window == queries.positions.shape[-1]:
        return region
    index = queries.positions.topk(window).indices.flip(-1)
    states = queries.states.take_along_dim(index[None, :, None, None, :, None], -2)
    positions = queries.positions.gather(-1, index)
    return replace(region, queries=replace(queries, states=states, positions=positions))


def _content(region: Region) -> dict[str, Any]:
    """What entries hold, by name."""
    names = ("keys", "values", "positions", "scores")
    return {name: held for name in names if (held := getattr(region, name)) is not None}


def _candidates(region: Region, event: int, tier: Tier, limit: int) -> _Candidates:
    """The best pages of a sequence's tier, of at least `limit` entries if it has so many."""
    keys, positions = region.keys[:, event], region.positions[:, event]
    device, num_entries, page_size = keys.device, tier.num_entries, tier.page_size
    lead = positions.shape[:2]
    if not num_entries:
        none = positions.new_zeros(*lead, 0)
        return _Candidates(none.cpu(), none.bool(), keys, positions)
    least, largest = (part.to(device).float() for part in tier.summaries())
    wanted = min(-(-limit // page_size), least.shape[-2])
    queries: Queries = region.queries
    scores = _page_scores(queries, event, least, largest)
    pages = scores.topk(wanted).indices.cpu()
    slots = (pages[..., None] * page_size + torch.arange(page_size)).flatten(-2)
    exists = slots < num_entries
    slots = slots.masked_fill(~exists, 0)
    places = torch.arange(lead[0])[:, None, None], torch.arange(lead[1])[:, None], slots
    exists = exists.to(device)
    found = tier.read("positions", places).to(device).long().masked_fill(~exists, _PADDING)
    return _Candidates(
        slots=slots,
        exists=exists,
        keys=torch.cat([keys, tier.read("keys", places).to(device, keys.dtype)], -2),
        positions=torch.cat([positions, found], -1),
    )


def _page_scores(queries: Queries, event: int, least: Tensor, largest: Tensor) -> Tensor:
    """float32 [layers, kv_heads, pages]: what pages could get at most, each query among them.

    Args:
        queries: see Queries.
        event: whose.
        least: float32 [layers, kv_heads, pages, head_dim]; see Tier.summaries.
        largest: the same.
    """
    bounds = logit_bounds(queries.states[:, event].flatten(2, 3) * queries.scale, least, largest)
    if queries.softcap:
        bounds = torch.tanh(bounds / queries.softcap) * queries.softcap
    group = queries.states.shape[3]
    real = (queries.positions[event] >= 0).repeat(group)
    return bounds.softmax(-1).mul_(real[:, None]).sum(-2)


def logit_bounds(states: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """The most that the product of a query and any key of a page can be: [..., queries, pages].

    Args:
        states: float32 [..., queries, head_dim].
        least: float32 [..., pages, head_dim], the least number of each channel.
        largest: the same, the largest.
    """
    positive, negative = states.clamp_min(0), states.clamp_max(0)
    return positive @ largest.transpose(-1, -2) + negative @ least.transpose(-1, -2)


def _mass(region: Region, event: int, candidates: _Candidates) -> Tensor:
    """float32 [layers, kv_heads, m + n]: attention of the window to region and candidates."""
    queries: Queries = region.queries
    return ops.attention_mass(
        queries.states[:, event],
        candidates.keys,
        queries.positions[event],
        candidates.positions,
        queries.scale,
        queries.softcap,
        None if queries.sinks is None else queries.sinks[:, 0],
    )


def _pooled(mass: Tensor, positions: Tensor, spared: Tensor) -> Tensor:
    """Each as much as the best within NEIGHBOURS in the order of positions.

    Args:
        mass: float32 [layers, kv_heads, m + n].
        positions: int64, of the same shape.
        spared: bool [layers, kv_heads, m], sinks and the recent window, which count nothing here.
    """
    size = spared.shape[-1]
    mass = torch.cat([mass[..., :size].masked_fill(spared, 0.0), mass[..., size:]], -1)
    order = positions.argsort(-1)
    best = F.max_pool1d(mass.gather(-1, order), 2 * NEIGHBOURS + 1, 1, NEIGHBOURS)
    return torch.empty_like(mass).scatter_(-1, order, best)


def _fetch(
    region: Region, event: int, tier: Tier, candidates: _Candidates, fetched: _Fetched
) -> tuple[Places, tuple[Index, dict[str, Tensor]]]:
    """Places in the tier that are read, and what lies where from now on; see Exchanged."""
    layer, head, place, source = fetched
    size = region.positions.shape[-1]
    below = source >= size
    own = _at(event, layer[~below], head[~below], source[~below])
    index = layer[below].cpu(), head[below].cpu(), (source[below] - size).cpu()
    other = *index[:2], candidates.slots[index]
    content = {}
    for name, held in _content(region).items():
        of_own = held[own]
        content[name] = torch.cat([of_own, tier.read(name, other).to(of_own)])
    order = torch.cat([(~below).nonzero()[:, 0], below.nonzero()[:, 0]])
    return other, (_at(event, layer[order], head[order], place[order]), content)


def _at(event: int, layer: Tensor, head: Tensor, slot: Tensor) -> Index:
    return layer, torch.full_like(layer, event), head, slot


def _given(region: Region, event: int, losers: Tensor, mass: Tensor, fetched: _Fetched) -> Spilled:
    """What goes down: losers that were not fetched, and survivors that had to make way."""
    layer, head, place, source = fetched
    size = losers.shape[-1]
    which = losers.clone()
    which[layer, head, place] = True
    own = source < size
    which[layer[own], head[own], source[own]] = False
    index = _at(event, *which.nonzero(as_tuple=True))
    held = _content(region)
    del held["positions"]
    content = {name: numbers[index] for name, numbers in held.items()}
    return Spilled(which, mass[..., :size], region.positions[:, event], content)
