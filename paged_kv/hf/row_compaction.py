"""Compactions of a cache's rows: the policy names losers, the newest entries take their places.

    before   | s s . x | . x . . | x . x x |         s sink  x survivor  . loser
    after    | s s x x | x x x   |  freed            the rest stays where it is

vLLM's tables only grow at their end, so there survivors move towards the tail; here pages are freed
at the tail, and a row stays in the pages that it has. Of a row with a residual, the newest pages
stay as they are: those before them are freed, and the table closes up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Arena, Places, entries_of
from paged_kv.policies.region import Compaction, Region, moves

if TYPE_CHECKING:
    from paged_kv.hf.sequences import Sequences

Tensor = torch.Tensor
MAX_NUMBERS = 1 << 21  # of keys, gathered at once
_PADDING = torch.iinfo(torch.int64).max


class _Part(NamedTuple):
    """Some rows in some layers.

    Args:
        arena: where the entries are.
        layers: int64 [layers], indices among those of the cache.
        rows: int64 [events].
        pages: int64 [layers, events, pages], on the device.
        sizes: int64 [events], entries.
        num_losers: int64 [events].
    """

    arena: Arena
    layers: Int64s
    rows: Int64s
    pages: Tensor
    sizes: Int64s
    num_losers: Int64s


def run(sequences: Sequences, layers: Int64s, rows: Int64s, num_losers: Int64s) -> None:
    """Rows give up entries in layers whose budgets and page formats are equal.

    Args:
        sequences: the cache.
        layers: int64 [layers], indices among those of the cache.
        rows: int64 [events].
        num_losers: int64 [events], entries to give up.

    Raises:
        PoolFull: the rows share pages with others, and there is no room for copies of their own.
    """
    policy = sequences.policy
    assert policy is not None
    own(sequences, layers, rows)
    if sequences.compression.spill:
        sequences.spilled.own(layers, rows, sequences.tables.arena(layers[0]).geometry)
    tails = sequences.residual.counts(sequences.num_tokens)
    for part in _parts(sequences, layers, rows, num_losers):
        region = _gather(sequences, part)
        decided = policy.compact(region)
        _apply(part, region, decided, tails[part.rows])
        if decided.weights is not None and region.weights is not None:
            gained = (decided.weights - region.weights).masked_fill(decided.losers, 0.0)
            sequences.counters.merged.append(gained.sum() / gained.shape[2])
        if region.spilled is not None and decided.changed is not None:
            sequences.counters.fetched.append(decided.changed.sum() / decided.changed.shape[2])
    _shrink(sequences, layers, rows, num_losers)
    sequences.counters.evicted += int(num_losers.sum()) * len(layers)
    sequences.counters.compactions += len(layers) * len(rows)


def own(sequences: Sequences, layers: Int64s, rows: Int64s) -> None:
    """No page of these will be anybody else's. Raises PoolFull: nothing has changed."""
    shared = sequences.tables.shared()
    which = np.zeros_like(shared)
    which[np.ix_(layers, rows)] = shared[np.ix_(layers, rows)]
    if which.any():
        sequences.pool.check(int(which.sum()), "a compaction of sequences that share pages")
        sequences.tables.own(which)


def _shrink(sequences: Sequences, layers: Int64s, rows: Int64s, num_losers: Int64s) -> None:
    tables, page_size = sequences.tables, sequences.pool.page_size
    tails = sequences.residual.counts(sequences.num_tokens)
    for row, num in zip(rows.tolist(), num_losers.tolist(), strict=True):
        if tails[row]:
            end = int(sequences.size[layers[0], row] - tails[row])
            assert end % page_size == num % page_size == 0, "the residual begins with a page"
            for layer in layers:
                tables.move_to_end(layer, row, (end - num) // page_size, end // page_size)
    sequences.size[np.ix_(layers, rows)] -= num_losers
    count = tables.count.copy()
    left = sequences.size[np.ix_(layers, rows)]
    count[np.ix_(layers, rows)] = -(-left // page_size)
    tables.truncate(count)


def _parts(sequences: Sequences, layers: Int64s, rows: Int64s, num_losers: Int64s) -> list[_Part]:
    """Rows of similar size, in a few layers at a time: keys and copies of them can be large."""
    tables, page_size = sequences.tables, sequences.pool.page_size
    arena = tables.arena(layers[0])
    sizes = sequences.size[layers[0], rows]
    parts = []
    magnitude = np.frexp(sizes)[1]
    for one in np.unique(magnitude):
        chosen = magnitude == one
        num_pages = -(-int(sizes[chosen].max()) // page_size)
        entry = arena.geometry.num_heads * arena.geometry.key_size
        numbers = int(chosen.sum()) * num_pages * page_size * entry
        at_once = max(1, MAX_NUMBERS // numbers)
        for start in range(0, len(layers), at_once):
            some = layers[start : start + at_once]
            ids = tables.ids[np.ix_(some, rows[chosen])][..., :num_pages]
            pages = torch.from_numpy(np.maximum(ids, 0)).to(arena.geometry.device)
            own = rows[chosen], pages, sizes[chosen], num_losers[chosen]
            parts.append(_Part(arena, some, *own))
    return parts


def _gather(sequences: Sequences, part: _Part) -> Region:
    """What the rows hold, as the policy sees it."""
    policy, arena = sequences.policy, part.arena
    assert policy is not None
    reads = policy.reads | ({"keys"} if policy.observation_window else frozenset())
    device = arena.geometry.device
    num_tokens, num_entries, num_losers = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (sequences.num_tokens[part.rows], part.sizes, part.num_losers)
    )
    index = torch.arange(part.pages.shape[-1] * sequences.pool.page_size, device=device)
    valid = index < num_entries[:, None, None]

    def side(name: str, padding: float) -> Tensor | None:
        if name != "positions" and name not in reads:
            return None
        return entries_of(arena.side[name], part.pages).masked_fill(~valid, padding)

    positions = entries_of(arena.side["positions"], part.pages).long().masked_fill(~valid, _PADDING)
    terms = sequences.terms[part.layers[0]]
    sinks = None
    if terms.sinks is not None:
        every = [sequences.terms[layer].sinks for layer in part.layers]
        sinks = torch.stack([own for own in every if own is not None]).float()
        sinks = sinks.view(len(every), 1, arena.geometry.num_heads, -1)
    heads = arena.geometry.num_heads
    look = (part.layers, part.rows, heads, terms.scale, terms.softcap, sinks)
    return Region(
        num_tokens=num_tokens,
        num_entries=num_entries,
        num_losers=num_losers,
        max_losers=int(part.num_losers.max()),
        layers=torch.from_numpy(sequences.layers[part.layers]).to(device),
        heads=torch.arange(arena.geometry.num_heads, device=device),
        positions=positions,
        keys=arena.entries("keys", part.pages).float() if "keys" in reads else None,
        values=arena.entries("values", part.pages).float() if "values" in reads else None,
        weights=side("weights", 0.0),
        scores=side("scores", 0.0),
        queries=sequences.ring.queries(*look),
        rotary=sequences.rotary() if sequences.rotary and "rotary" in reads else None,
        spilled=sequences.spilled.views(part.layers, part.rows),
    )


def _apply(part: _Part, region: Region, decided: Compaction, tails: Int64s) -> None:
    """Survivors of what is freed move into the losers' places; those that changed are written.

    Args:
        part: whose entries they are.
        region: what they hold.
        decided: what becomes of it.
        tails: int64 [events], entries behind the freed ones, which stay where they are.
    """
    arena, pages = part.arena, part.pages
    index = torch.arange(region.positions.shape[-1], device=pages.device)
    end = (region.num_entries - torch.from_numpy(tails).to(pages.device))[:, None, None]
    freed = (index >= end - region.num_losers[:, None, None]) & (index < end)
    source, target = moves(decided, freed, region.max_losers, spare=0)
    head = torch.arange(arena.geometry.num_heads, device=pages.device)[:, None]

    def places(slots: Tensor) -> Places:
        page = pages[:, :, None].expand(*slots.shape[:3], -1).gather(-1, slots // arena.page_size)
        return head.expand_as(slots), page, slots % arena.page_size

    read, write = places(source), places(target)
    arena.move(read, write)
    for tensor in arena.side.values():
        tensor[write] = tensor[read]
    if decided.changed is None:
        return
    # What has not changed keeps its bytes: quantized again, it could become something else.
    new = decided.changed.gather(-1, source)
    column, there = source[new], (write[0][new], write[1][new], write[2][new])
    layer, event, own_head, _ = new.nonzero(as_tuple=True)
    for name in ("keys", "values"):
        numbers = getattr(decided, name)
        if numbers is not None:
            arena.put(name, there, numbers[layer, event, own_head, column])
    for name, tensor in arena.side.items():
        numbers = getattr(decided, name)
        if numbers is not None:
            tensor[there] = numbers[layer, event, own_head, column].to(tensor.dtype)
