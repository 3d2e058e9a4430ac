"""Kernels for reference.attention_mass: dense keys, a few queries, their probabilities
summed up, or the largest."""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kv.kernels.triton.attention import LOG2_E, NOTHING


@triton.jit
def _block_logits(
    queries,
    keys,
    query_positions,
    key_positions,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
):
    logit = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale
    if SOFTCAP:
        logit = softcap * (1.0 - 2.0 / (tl.exp2(logit * (2.0 * LOG2_E / softcap)) + 1.0))
    visible = key_positions[None] <= query_positions[:, None]
    return tl.where(visible, logit * LOG2_E, NOTHING)


@triton.jit
def _load_rows(source, row, limit, SIZE: tl.constexpr):
    """float32 [rows, columns] of dense rows; 0 beyond them."""
    column = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = (row < limit)[:, None] & (column < SIZE)[None]
    return tl.load(source + row[:, None] * SIZE + column[None], mask=mask, other=0.0)


@triton.jit
def total_kernel(
    totals,
    queries,
    query_positions,
    keys,
    key_positions,
    sinks,
    num_queries,
    num_entries,
    scale,
    softcap,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """log2 of each query's sum of exp2(logits): float32 [heads, queries].

    Grid: KV heads, blocks of queries (group x queries, flat). All tensors are dense; sinks:
    float32 [heads, queries] or None.
    """
    head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    used = query < num_queries
    states = _load_rows(queries + head * num_queries * SIZE, query, num_queries, SIZE)
    query_pos = tl.load(query_positions + head * num_queries + query, mask=used, other=-1)
    peak = tl.full((QUERIES,), NOTHING, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if sinks is not None:
        peak = tl.load(sinks + head * num_queries + query, mask=used, other=0.0) * LOG2_E
        total += 1.0
    for begin in range(0, num_entries, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        inside = entry < num_entries
        key_pos = tl.load(key_positions + head * num_entries + entry, mask=inside, other=1 << 62)
        block = _load_rows(keys + head * num_entries * SIZE, entry, num_entries, SIZE)
        logit = _block_logits(states, block, query_pos, key_pos, scale, softcap, SOFTCAP)
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        reference = tl.where(new_peak == NOTHING, 0.0, new_peak)
        total = total * tl.exp2(peak - reference) + tl.sum(tl.exp2(logit - reference[:, None]), 1)
        peak = new_peak
    tl.store(totals + head * num_queries + query, peak + tl.log2(total), mask=used)


@triton.jit
def mass_kernel(
    result,
    totals,
    queries,
    query_positions,
    keys,
    key_positions,
    num_queries,
    num_entries,
    scale,
    softcap,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """What each entry gets, in all or (LARGEST) from one query at most: float32 [heads, entries].

    Grid: KV heads, blocks of entries.
    """
    head = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < num_entries
    key_pos = tl.load(key_positions + head * num_entries + entry, mask=inside, other=1 << 62)
    block = _load_rows(keys + head * num_entries * SIZE, entry, num_entries, SIZE)
    mass = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, num_queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        used = query < num_queries
        states = _load_rows(queries + head * num_queries * SIZE, query, num_queries, SIZE)
        query_pos = tl.load(query_positions + head * num_queries + query, mask=used, other=-1)
        total = tl.load(totals + head * num_queries + query, mask=used, other=0.0)
        logit = _block_logits(states, block, query_pos, key_pos, scale, softcap, SOFTCAP)
        shares = tl.exp2(logit - total[:, None])
        shares = tl.where(logit == NOTHING, 0.0, shares)
        mass = tl.maximum(mass, tl.max(shares, 0)) if LARGEST else mass + tl.sum(shares, 0)
    tl.store(result + head * num_entries + entry, mass, mask=inside)
