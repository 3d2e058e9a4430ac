"""How much the last queries ask for what one sequence holds, and for what it has spilled."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from paged_kv.kernels import ops
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.policies.region import ObservedQueries, Region
from paged_kv.policies.tier import Tier

Tensor = torch.Tensor

# Entries of a tier that are looked at exactly, for each that may be fetched: bounds of whole pages
# rank them well, not perfectly.
CANDIDATES = 4
# Entries on each side that are worth what an entry is worth: who asks for a phrase finds its
# beginning, and the next query, long before the next compaction, wants what follows.
NEIGHBOURS = 8
_PADDING = torch.iinfo(torch.int64).max


class Candidates(NamedTuple):
    """What one event holds, and behind it entries of the tier that may be worth it.

    Args:
        slots: int64 [layers, kv_heads, n], of the candidates in the tier.
        exists: bool [layers, kv_heads, n]; the others are padding.
        keys: float32 [layers, kv_heads, m + n, head_dim].
        positions: int64 [layers, kv_heads, m + n]; padding has the largest int64.
    """

    slots: Tensor
    exists: Tensor
    keys: Tensor
    positions: Tensor


def find(region: Region, event: int, tier: Tier, limit: int) -> Candidates:
    """The best pages of a sequence's tier, of at least `limit` entries if it has so many.

    Args:
        region: see Region.
        event: the sequence.
        tier: what the sequence has spilled.
        limit: CANDIDATES for each entry that may be fetched.
    """
    keys, positions = region.content["keys"].of_event(event), region.positions[:, event]
    device, num_entries, page_size = keys.device, tier.num_entries, tier.page_size
    num_layers, heads = positions.shape[:2]
    if not num_entries:
        none = positions.new_zeros(num_layers, heads, 0)
        return Candidates(none, none.bool(), keys, positions)
    least, largest = (part.to(device).float() for part in tier.summaries())
    wanted = min(-(-limit // page_size), least.shape[-2])
    pages = _page_scores(region.queries, event, least, largest).topk(wanted).indices
    slots = (pages[..., None] * page_size + torch.arange(page_size, device=device)).flatten(-2)
    exists = slots < num_entries
    slots = slots.masked_fill(~exists, 0)
    places = torch.arange(num_layers)[:, None, None], torch.arange(heads)[:, None], slots.cpu()
    spilled = tier.read("positions", places).to(device).long().masked_fill(~exists, _PADDING)
    return Candidates(
        slots=slots,
        exists=exists,
        keys=torch.cat([keys, tier.read("keys", places).to(device, keys.dtype)], -2),
        positions=torch.cat([positions, spilled], -1),
    )


def _page_scores(queries: ObservedQueries, event: int, least: Tensor, largest: Tensor) -> Tensor:
    """float32 [layers, kv_heads, pages]: what pages could get at most, each query among them.

    Args:
        queries: see ObservedQueries.
        event: whose.
        least: float32 [layers, kv_heads, pages, head_dim]; see Tier.summaries.
        largest: the same.
    """
    states = queries.states[:, event]
    bounds = logit_bounds(states.flatten(2, 3) * queries.scale, least, largest)
    if queries.softcap:
        bounds = torch.tanh(bounds / queries.softcap) * queries.softcap
    real = (queries.positions[event] >= 0).repeat(states.shape[2])
    return bounds.softmax(-1).mul_(real[:, None]).sum(-2)


def logit_bounds(states: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """The most that the product of a query and any key of a page can be: [..., queries, pages].

    Args:
        states: float32 [..., queries, head_dim].
        least: float32 [..., pages, head_dim], the least number of each channel.
        largest: the same, the largest.
    """
    signs = torch.cat([states.clamp_min(0), states.clamp_max(0)], -1)
    return signs @ torch.cat([largest, least], -1).transpose(-1, -2)


def mass(region: Region, event: int, candidates: Candidates) -> Tensor:
    """float32 [layers, kv_heads, m + n]: attention of the window to region and candidates."""
    queries: ObservedQueries = region.queries
    sinks = None if queries.sinks is None else queries.sinks[:, 0]
    return ops.attention_mass(
        DenseAttention(
            queries.states[:, event],
            candidates.keys,
            queries.positions[event],
            candidates.positions,
            Terms(queries.scale, queries.softcap, sinks),
        )
    )


def pooled(mass: Tensor, positions: Tensor, spared: Tensor) -> Tensor:
    """Each as much as the best within NEIGHBOURS in the order of positions.

    Args:
        mass: float32 [layers, kv_heads, m + n].
        positions: int64, of the same shape.
        spared: bool [layers, kv_heads, m], sinks and the recent window, which count nothing here.
    """
    mass[..., : spared.shape[-1]].masked_fill_(spared, 0.0)
    order = positions.argsort(-1)
    best = F.max_pool1d(mass.gather(-1, order), 2 * NEIGHBOURS + 1, 1, NEIGHBOURS)
    return torch.empty_like(mass).scatter_(-1, order, best)


def mean_query(queries: ObservedQueries, event: int) -> Tensor:
    """float32 [layers, kv_heads, head_dim]: of the window and the query heads, scaled."""
    real = (queries.positions[event] >= 0).float()
    share = real * (queries.scale / queries.states.shape[3] / real.sum().clamp_min(1))
    return (share @ queries.states[:, event]).sum(2)
