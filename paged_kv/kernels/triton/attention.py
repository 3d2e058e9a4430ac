"""Attention over packed pages, in splits of every row's entries; sums.py has what follows.

A program takes the query heads of one KV head, of one new token or of a few neighbours, so that an
entry is read and decoded once for all of them. Logits are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kv.kernels.triton.numbers import load_numbers, rotate

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def rotate_kernel(result, states, token_step, head_step, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Queries as rotated keys need them. Grid: tokens, heads; result: float32, dense."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, triton.next_power_of_2(SIZE))[None]
    source = states + token * token_step + head * head_step
    numbers = tl.load(source + column, mask=column < SIZE, other=0.0).to(tl.float32)
    place = (token * tl.num_programs(1) + head) * SIZE + column
    tl.store(result + place, rotate(numbers, BLOCK), mask=column < SIZE)


@triton.jit
def _find_row(starts, num_rows, block, TOKENS: tl.constexpr):
    """The row that a block of TOKENS tokens belongs to: row r's first is starts[r] // TOKENS + r.

    Rows have a block more than they may need, so that the number of blocks is known on the host.
    """
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_queries(states, token, head, token_step, head_step, used, SIZE: tl.constexpr):
    """float32 [queries, columns], 0 beyond the head's size."""
    column = tl.arange(0, triton.next_power_of_2(SIZE))
    place = token.to(tl.int64)[:, None] * token_step + head[:, None] * head_step + column[None]
    mask = used[:, None] & (column < SIZE)[None]
    return tl.load(states + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def locate(table, row, table_step, entry, inside, PAGE_SIZE: tl.constexpr):
    """(page id, offset), int64 [entries], of a row's entries."""
    place = table + row * table_step + entry // PAGE_SIZE
    return tl.load(place, mask=inside, other=0).to(tl.int64), (entry % PAGE_SIZE).to(tl.int64)


@triton.jit
def logits(
    queries,
    keys,
    visible,
    scale,
    softcap,
    weights,
    side_place,
    inside,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [queries, entries] in base 2."""
    logit = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        logit = softcap * (1.0 - 2.0 / (tl.exp2(logit * (2.0 * LOG2_E / softcap)) + 1.0))
    logit = logit * LOG2_E
    if weights is not None:
        logit += tl.log2(tl.load(weights + side_place, mask=inside, other=1.0))[None]
    return tl.where(visible, logit, NOTHING)


@triton.jit
def segment_kernel(
    mixed,
    peaks,
    sums,
    states,
    starts,
    words,
    table,
    counts,
    befores,
    totals,
    side_table,
    weights,
    kept,
    kept_peaks,
    num_rows,
    scale,
    softcap,
    token_step,
    head_step,
    table_step,
    page_step,
    block_head_step,
    side_step,
    side_page_step,
    side_head_step,
    kept_step,
    kept_peak_step,
    first_split,
    num_splits,
    all_splits,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIDE_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax and mix of a split of a segment. Grid: token blocks, KV heads, splits.

    Writes, per token, head and split: mixed float32 [value_size] and sums, both times
    exp2(-peaks); sums is 0 where nothing is visible, and then mixed is not written.
    kept: None, or [tokens, heads, kept_step] of what each entry gets, times exp2(-kept_peaks);
    kept_peaks: float32 [tokens, heads, kept_peak_step], the peak after each step of ENTRIES.
    """
    TOKENS: tl.constexpr = QUERIES // GROUP
    kv_head, split = tl.program_id(1), tl.program_id(2)
    row = _find_row(starts, num_rows, tl.program_id(0), TOKENS)
    start = tl.load(starts + row)
    num_new = tl.load(starts + row + 1) - start
    first = (tl.program_id(0) - start // TOKENS - row) * TOKENS
    if first >= num_new:
        return
    number = tl.arange(0, QUERIES)
    token, head = first + number // GROUP, kv_head * GROUP + number % GROUP
    used = (number < TOKENS * GROUP) & (token < num_new)
    count, before, total = (
        tl.load(counts + row),
        tl.load(befores + row),
        tl.load(totals + row),
    )
    position = total - num_new + token - before  # the newest entry a query sees, in this segment
    end = tl.minimum(count, total - num_new + tl.minimum(first + TOKENS, num_new) - before)
    span = tl.cdiv(tl.cdiv(end, num_splits), ENTRIES) * ENTRIES
    low = split * span
    queries = load_queries(states, start + token, head, token_step, head_step, used, KEY.size)
    peak = tl.full((QUERIES,), NOTHING, tl.float32)
    weight_sum = tl.zeros((QUERIES,), tl.float32)
    mix = tl.zeros((QUERIES, triton.next_power_of_2(VALUE.size)), tl.float32)
    for begin in range(low, tl.minimum(low + span, end), ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        inside = entry < end
        page, offset = locate(table, row, table_step, entry, inside, KEY.page_size)
        block = page * page_step + kv_head * block_head_step
        keys = load_numbers(words, block, offset, inside, KEY)
        side_place = entry
        if weights is not None:
            page, side = locate(side_table, row, side_step, before + entry, inside, SIDE_PAGE)
            side_place = page * side_page_step + kv_head * side_head_step + side
        visible = inside[None] & (entry[None] <= position[:, None])
        logit = logits(
            queries,
            keys,
            visible,
            scale,
            softcap,
            weights,
            side_place,
            inside,
            SOFTCAP,
            PRECISION,
        )
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        reference = tl.where(new_peak == NOTHING, 0.0, new_peak)
        shares = tl.exp2(logit - reference[:, None])
        shrink = tl.exp2(peak - reference)
        if kept is not None:  # places are computed anew: there are few registers
            place = (start + token).to(tl.int64) * tl.num_programs(1) * GROUP + head
            here = place[:, None] * kept_step + entry[None]
            shown = used[:, None] & inside[None]
            tl.store(kept + here, shares.to(kept.dtype.element_ty), mask=shown)
            tl.store(kept_peaks + place * kept_peak_step + begin // ENTRIES, reference, mask=used)
        weight_sum = weight_sum * shrink + tl.sum(shares, 1)
        values = load_numbers(words, block, offset, inside, VALUE)
        mix = tl.dot(shares, values, mix * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    place = ((start + token).to(tl.int64) * tl.num_programs(1) * GROUP + head) * all_splits
    place += first_split + split
    tl.store(peaks + place, peak, mask=used)
    tl.store(sums + place, weight_sum, mask=used)
    column = tl.arange(0, mix.shape[1])
    mask = (used & (weight_sum != 0.0))[:, None] & (column < VALUE.size)[None]
    tl.store(mixed + place[:, None] * VALUE.size + column[None], mix, mask=mask)
