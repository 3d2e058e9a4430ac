"""Entries by position, which slots do not tell after the first compaction, and by slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from paged_kv.policies.region import Region


def ranks(positions: torch.Tensor) -> torch.Tensor:
    """int64 [..., m]: place of each entry in the order of positions; padding comes last."""
    order = positions.argsort(-1)
    index = torch.arange(positions.shape[-1], device=positions.device)
    return torch.empty_like(order).scatter_(-1, order, index.expand_as(order))


def prefer_newest(scores: torch.Tensor, region: Region, share: float) -> torch.Tensor:
    """Scores in which the newest `share` of the entries that stay beats all others.

    Args:
        scores: float32 [..., m].
        region: see Region.
        share: 0 to 1; the number of entries is rounded (half to even).
    """
    stay = region.num_entries - region.num_losers
    newest = (stay.double() * share).round().long()
    first = (region.num_entries - newest)[:, None, None]
    return scores.masked_fill(ranks(region.positions) >= first, torch.finfo(scores.dtype).max)


def take(entries: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What lies in slots [..., n]: [..., n] of entries [..., m], [..., n, d] of [..., m, d]."""
    if entries.ndim == slots.ndim:
        return entries.gather(-1, slots)
    width = entries.shape[-1]
    # As rows of one list: torch's gather goes through them number by number, ten times slower.
    every, apart = _listed(entries)
    rows = every.index_select(0, _rows(entries, slots, apart))
    return rows.view(*slots.shape, width)


def put(
    entries: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """A copy of entries with rows in slots.

    Args:
        entries: [..., m] or [..., m, d].
        slots: int64 [..., n], distinct where valid.
        rows: [..., n] or [..., n, d], like entries.
        valid: bool [..., n]; other rows are not written.
    """
    size = entries.shape[slots.ndim - 1]
    slots = slots.masked_fill(~valid, size)  # one more place, for what nobody wants
    if entries.ndim == slots.ndim:
        return F.pad(entries, (0, 1)).scatter_(-1, slots, rows)[..., :-1]
    width = entries.shape[-1]
    padded = entries.new_empty(*entries.shape[:-2], size + 1, width)
    padded[..., :-1, :] = entries
    padded.view(-1, width).index_copy_(0, _rows(padded, slots, size + 1), rows.reshape(-1, width))
    return padded[..., :-1, :]


def _rows(entries: torch.Tensor, slots: torch.Tensor, apart: int) -> torch.Tensor:
    """int64 [all slots]: where slots [..., n] of entries [..., m, d] are in a list, see _listed."""
    lead = slots.shape[:-1]
    assert entries.shape[:-2] == lead, f"{entries.shape} has other rows than {slots.shape}"
    first = torch.arange(lead.numel(), device=slots.device).view(*lead, 1) * apart
    return (slots + first).flatten()


def _listed(entries: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[rows, d] in which entries [..., m, d] are, and from one [m, d] to the next, in rows.

    A view where it can be one: also of the first slots of larger buffers, and of one [m, d] that
    is expanded.
    """
    size, width = entries.shape[-2:]
    parts = entries[None].flatten(0, -3)
    apart, rest = divmod(parts.stride(0), width)
    if rest or parts.stride()[1:] != (width, 1):
        parts, apart = parts.contiguous(), size
    rows = (len(parts) - 1) * apart + size if len(parts) else 0
    return parts.as_strided((rows, width), (width, 1)), apart


def share(numbers: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Of each free entry in the sum over all of them; 0 for the others.

    Args:
        numbers: float32 [..., m], not negative.
        free: bool [..., m].
    """
    numbers = numbers.where(free, 0)
    return numbers / numbers.sum(-1, keepdim=True).clamp_min(torch.finfo(numbers.dtype).tiny)
