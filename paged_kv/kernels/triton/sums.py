"""After attention in splits: the splits' sum, and what each entry got."""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kv.kernels.triton.attention import LOG2_E, NOTHING, load_queries, locate, logits
from paged_kv.kernels.triton.numbers import load_numbers, rotate


@triton.jit
def combine_kernel(
    output,
    totals,
    mixed,
    peaks,
    sums,
    sinks,
    first_splits,
    all_splits,
    token_step,
    head_step,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """Adds the splits. Grid: tokens, heads.

    The first segment's splits are rotated back (its values are stored so), the second's are not.
    totals: float32 [tokens, heads], log2 of the sum of exp2(logits), or None.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = (token * tl.num_programs(1) + head) * all_splits
    split = tl.arange(0, SPLITS)
    share = tl.load(sums + row + split, mask=split < all_splits, other=0.0)
    used = share != 0.0  # a NaN is used: it must not be lost
    peak = tl.load(peaks + row + split, mask=used, other=NOTHING)
    top = tl.max(peak, 0)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        top = tl.maximum(top, sink)
    top = tl.where(top == NOTHING, 0.0, top)
    factor = tl.exp2(peak - top)
    total = tl.sum(tl.where(used, share * factor, 0.0), 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    column = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = used[:, None] & (column < SIZE)[None]
    place = (row + split)[:, None] * SIZE + column[None]
    part = tl.load(mixed + place, mask=mask, other=0.0) * factor[:, None]
    part = tl.where(used[:, None], part, 0.0)
    early = (split < first_splits)[:, None]
    rotated = tl.sum(tl.where(early, part, 0.0), 0, keep_dims=True)
    result = rotate(rotated, ROTATION) + tl.sum(tl.where(early, 0.0, part), 0, keep_dims=True)
    result = result / tl.where(total == 0.0, 1.0, total)
    place = token * token_step + head * head_step + column[None]
    tl.store(output + place, result.to(output.dtype.element_ty), mask=(column < SIZE)[None])
    if totals is not None:
        tl.store(totals + token * tl.num_programs(1) + head, top + tl.log2(total))


@triton.jit
def score_kernel(
    scores,
    log_totals,
    states,
    starts,
    words,
    table,
    counts,
    befores,
    totals,
    side_table,
    weights,
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
    score_page_step,
    score_head_step,
    log_decay,
    KEY: tl.constexpr,
    SIDE_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    FADES: tl.constexpr,
):
    """Adds what entries got to their scores. Grid: blocks of ENTRIES entries, rows, KV heads.

    log_decay: log2 of what each new token leaves of the scores before it; 0 unless FADES. Then a
    slot belongs to one row, so to one program, which may load, change and store it.
    """
    TOKENS: tl.constexpr = QUERIES // GROUP
    row, kv_head = tl.program_id(1), tl.program_id(2)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < tl.load(counts + row)
    start = tl.load(starts + row)
    num_new = tl.load(starts + row + 1) - start
    if (num_new == 0) | (tl.program_id(0) * ENTRIES >= tl.load(counts + row)):
        return
    before, total = tl.load(befores + row), tl.load(totals + row)
    page, offset = locate(table, row, table_step, entry, inside, KEY.page_size)
    block = page * page_step + kv_head * block_head_step
    keys = load_numbers(words, block, offset, inside, KEY)
    page, side = locate(side_table, row, side_step, before + entry, inside, SIDE_PAGE)
    side_place = page * side_page_step + kv_head * side_head_step + side
    number = tl.arange(0, QUERIES)
    head = kv_head * GROUP + number % GROUP
    mass = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, num_new, TOKENS):
        token = first + number // GROUP
        used = (number < TOKENS * GROUP) & (token < num_new)
        position = total - num_new + token - before
        queries = load_queries(states, start + token, head, token_step, head_step, used, KEY.size)
        visible = used[:, None] & inside[None] & (entry[None] <= position[:, None])
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
        place = (start + token) * (tl.num_programs(2) * GROUP) + head
        log_total = tl.load(log_totals + place, mask=used, other=0.0)
        if FADES:  # in the exponent, once per query
            log_total -= (num_new - 1 - token) * log_decay
        shares = tl.exp2(logit - log_total[:, None])
        mass += tl.sum(tl.where(visible, shares, 0.0), 0)
    place = page * score_page_step + kv_head * score_head_step + side
    _add(scores + place, mass, inside, num_new, log_decay, FADES)


@triton.jit
def kept_kernel(
    scores,
    log_totals,
    kept,
    kept_peaks,
    starts,
    counts,
    befores,
    totals,
    side_table,
    kept_step,
    kept_peak_step,
    side_step,
    score_page_step,
    score_head_step,
    log_decay,
    SIDE_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    ENTRIES: tl.constexpr,
    FADES: tl.constexpr,
):
    """As score_kernel, of what segment_kernel has kept, in steps of STEP. The same grid."""
    row, kv_head = tl.program_id(1), tl.program_id(2)
    count, start = tl.load(counts + row), tl.load(starts + row)
    num_new = tl.load(starts + row + 1) - start
    if (num_new == 0) | (tl.program_id(0) * ENTRIES >= count):
        return
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < count
    before, total = tl.load(befores + row), tl.load(totals + row)
    number = tl.arange(0, triton.next_power_of_2(GROUP))
    used = number < GROUP
    mass = tl.zeros((ENTRIES,), tl.float32)
    for token in range(0, num_new):
        newest = total - num_new + token - before  # that the token sees
        visible = used[:, None] & (inside & (entry <= newest))[None]
        place = (start + token).to(tl.int64) * (tl.num_programs(2) * GROUP)
        place += kv_head * GROUP + number
        log_total = tl.load(log_totals + place, mask=used, other=0.0)
        if FADES:
            log_total -= (num_new - 1 - token) * log_decay
        share = tl.load(kept + place[:, None] * kept_step + entry[None], mask=visible, other=0.0)
        peaks = kept_peaks + place[:, None] * kept_peak_step + entry[None] // STEP
        factor = tl.exp2(tl.load(peaks, mask=visible, other=0.0) - log_total[:, None])
        mass += tl.sum(tl.where(visible, share.to(tl.float32) * factor, 0.0), 0)
    page, side = locate(side_table, row, side_step, before + entry, inside, SIDE_PAGE)
    place = page * score_page_step + kv_head * score_head_step + side
    _add(scores + place, mass, inside, num_new, log_decay, FADES)


@triton.jit
def _add(places, mass, inside, num_new, log_decay, FADES: tl.constexpr):
    """To scores; see score_kernel."""
    if FADES:
        faded = tl.load(places, mask=inside, other=0.0) * tl.exp2(num_new * log_decay)
        tl.store(places, faded + mass, mask=inside)
    else:  # rows may share a page, so that programs may add to one place
        tl.atomic_add(places, mass, mask=inside, sem="relaxed")
