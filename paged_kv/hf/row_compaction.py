"""Compactions of a cache's rows, which free pages at the end of their tables; see store.compaction.

Of a row with a residual, the newest pages stay as they are: those before them are freed, and the
table closes up.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.rows import Rows
from paged_kv.hf.tables import Bools
from paged_kv.kernels.operands import Terms
from paged_kv.policies.region import Compaction, Region
from paged_kv.policies.written import ModelFacts
from paged_kv.store.compaction import compact
from paged_kv.store.holding import Holding
from paged_kv.store.layers import PageStore
from paged_kv.store.query_gathering import QueryGathering
from paged_kv.store.ragged import to_device

Tensor = torch.Tensor


def run(rows: Rows, group: int, chosen: Int64s, num_losers: Int64s) -> None:
    """Rows give up entries in a group of layers, whose budgets and page formats are equal.

    Args:
        rows: of the cache.
        group: of its layers, an index.
        chosen: int64 [events], which rows.
        num_losers: int64 [events], entries to give up.

    Raises:
        PoolFull: the rows share pages with others, and there is no room for copies of their own.
    """
    policy, layers = rows.policy, rows.groups[group].layers
    assert policy is not None
    own(rows, layers, chosen)
    if rows.compression.spill:
        rows.spilled.own(group, chosen, rows.tables.arena(layers[0]).geometry)
    facts = _facts(rows)
    rows.is_torn = True  # if an error comes from here
    for places in _alike(rows, layers):
        store = _store(rows, group, layers[places[0]])
        holding = _holding(rows, group, places, chosen, num_losers)
        compact(policy, store, holding, "tail", facts, partial(_note, rows))
    _shrink(rows, layers, chosen, num_losers)
    rows.is_torn = False
    rows.counters.evicted += int(num_losers.sum()) * len(layers)
    rows.counters.compactions += len(layers) * len(chosen)


def own(rows: Rows, layers: Int64s, chosen: Int64s) -> None:
    """No page of these will be anybody else's. Raises PoolFull: nothing has changed."""

    def find() -> Bools:
        shared = rows.tables.shared()
        which = np.zeros_like(shared)
        which[np.ix_(layers, chosen)] = shared[np.ix_(layers, chosen)]
        return which

    if find().any():
        rows.pool.make_room(lambda: int(find().sum()))
    if (which := find()).any():
        rows.pool.check(int(which.sum()), "a compaction of sequences that share pages")
        rows.tables.own(which)


def _alike(rows: Rows, layers: Int64s) -> list[Int64s]:
    """Places in these layers of those that have a scale and a softcap in common.

    GPT-2's can have a scale each.
    """
    kinds = [rows.terms[layer][:2] for layer in layers]
    return [
        np.array([place for place, other in enumerate(kinds) if other == kind])
        for kind in dict.fromkeys(kinds)
    ]


def _store(rows: Rows, group: int, like: int) -> PageStore:
    """The layers of a group, which share the pages of an arena.

    Args:
        rows: of the cache.
        group: of its layers, an index.
        like: one of these layers, whose scale and softcap count.
    """
    layers = rows.groups[group].layers
    arena = rows.tables.arena(layers[0])
    device, num_heads = arena.geometry.device, arena.geometry.num_heads
    scale, softcap, sinks = rows.terms[like]
    if sinks is not None:
        every = [rows.terms[layer].sinks for layer in layers]
        sinks = torch.stack([part for part in every if part is not None]).float()
        sinks = sinks.view(len(every), 1, num_heads, -1)
    spilled = None
    if rows.compression.spill:
        shape = rows.spilled.shape(group, arena.geometry)
        spilled = partial(rows.spilled.of, group=group, shape=shape)
    return PageStore(
        pages=arena.pages,
        side=arena.side_data,
        stack_layers=torch.zeros(len(layers), dtype=torch.int64, device=device),
        layer_ids=rows.layers[layers],
        head_ids=np.arange(num_heads),
        terms=Terms(scale, softcap, sinks),
        ring=rows.ring if rows.ring.window else None,
        ring_layers=to_device(layers, device),
        spilled=spilled,
    )


def _facts(rows: Rows) -> ModelFacts:
    """What the policy wants to know of the model."""
    rotary = rows.rotary() if rows.rotary is not None and rows.reads_rotary else None
    if isinstance(rows.query_statistics, QueryGathering):
        rows.query_statistics.freeze()  # entries are rated by the same ones from now on
    return ModelFacts(rotary, rows.query_statistics)


def _holding(rows: Rows, group: int, places: Int64s, chosen: Int64s, num_losers: Int64s) -> Holding:
    """What some rows hold in the layers at these places of a group."""
    schedule, layers = rows.groups[group]
    assert schedule is not None
    layers = layers[places]
    sizes = rows.size[layers[0], chosen]
    num_pages = -(-int(sizes.max()) // rows.pool.page_size)
    evicted = rows.num_tokens[chosen] - sizes
    ids = rows.tables.ids[np.ix_(layers, chosen)][..., :num_pages]
    return Holding(
        layers=places,
        pages=to_device(np.maximum(ids, 0), rows.device),
        num_tokens=rows.num_tokens[chosen],
        num_entries=sizes,
        num_losers=num_losers,
        rated=schedule.reached(evicted) - evicted,
        tail=rows.residual.counts(rows.num_tokens)[chosen],
        rows=chosen,
        first=rows.ring.known[chosen],
        owners=chosen.tolist(),
    )


def _note(rows: Rows, holding: Holding, region: Region, decided: Compaction) -> None:
    """Counts what was merged (a tensor: nobody waits for a GPU) and fetched."""
    heads = region.positions.shape[2]
    if decided.weights is not None and region.weights is not None:
        gained = (decided.weights - region.weights).masked_fill(decided.losers, 0.0)
        rows.counters.merged.append(gained.sum() / heads)
    if decided.exchanged is not None:
        rows.counters.fetched += len(decided.exchanged.places[0]) / heads


def _shrink(rows: Rows, layers: Int64s, chosen: Int64s, num_losers: Int64s) -> None:
    tables, page_size = rows.tables, rows.pool.page_size
    tails = rows.residual.counts(rows.num_tokens)
    for row, num in zip(chosen.tolist(), num_losers.tolist(), strict=True):
        if tails[row]:
            end = int(rows.size[layers[0], row] - tails[row])
            assert end % page_size == num % page_size == 0, "the residual begins with a page"
            for layer in layers:
                tables.move_to_end(layer, row, (end - num) // page_size, end // page_size)
    rows.size[np.ix_(layers, chosen)] -= num_losers
    count = tables.count.copy()
    sizes = rows.size[np.ix_(layers, chosen)]
    count[np.ix_(layers, chosen)] = -(-sizes // page_size)
    tables.truncate(count)
