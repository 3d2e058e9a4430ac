"""Kernels that put entries into pages, take them out and move them."""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kv.kernels.triton.numbers import INT4, load_numbers, rotate, store_numbers


@triton.jit
def write_kernel(
    words,
    keys,
    values,
    slots,
    num_tokens,
    page_step,
    head_step,
    key_token_step,
    key_head_step,
    value_token_step,
    value_head_step,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: blocks of TOKENS tokens, KV heads, keys and values."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    inside = slot >= 0
    slot = tl.where(inside, slot, 0)
    block = slot // KEY.page_size * page_step + head * head_step
    offset = slot % KEY.page_size
    if tl.program_id(2) == 0:
        source = keys + head * key_head_step
        _store_rows(words, block, offset, inside, source, token * key_token_step, KEY)
    else:
        source = values + head * value_head_step
        _store_rows(words, block, offset, inside, source, token * value_token_step, VALUE)


@triton.jit
def store_kernel(words, blocks, offsets, numbers, num_entries, PART: tl.constexpr, N: tl.constexpr):
    """Grid: blocks of N entries; numbers: [entries, size]. Offset NOWHERE: left out."""
    entry = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = entry < num_entries
    block = tl.load(blocks + entry, mask=inside, other=0)
    offset = tl.load(offsets + entry, mask=inside, other=-1)
    inside = offset >= 0
    offset = tl.where(inside, offset, 0)
    _store_rows(words, block, offset, inside, numbers, entry * PART.size, PART)


@triton.jit
def _store_rows(words, block, offset, inside, source, row, PART: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(PART.size))
    mask = inside[:, None] & (column < PART.size)[None]
    numbers = tl.load(source + row[:, None] + column[None], mask=mask, other=0.0)
    store_numbers(words, block, offset, inside, numbers.to(tl.float32), PART)


@triton.jit
def gather_kernel(
    result,
    words,
    layers,
    pages,
    num_pages,
    layer_step,
    page_step,
    head_step,
    PART: tl.constexpr,
    N: tl.constexpr,
):
    """Grid: (layers x pages, KV heads, blocks of N slots); pages: int64 [num_pages].

    Writes [layers x pages, KV heads, page_size, size].
    """
    first, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    layer = tl.load(layers + first // num_pages)
    page = tl.load(pages + first % num_pages)
    offset = tl.program_id(2).to(tl.int64) * N + tl.arange(0, N)
    inside = offset < PART.page_size
    block = layer * layer_step + page * page_step + head * head_step
    numbers = load_numbers(words, block + offset * 0, offset, inside, PART)
    numbers = rotate(numbers, PART.rotation)
    column = tl.arange(0, numbers.shape[1])
    row = (first * tl.num_programs(1) + head) * PART.page_size + offset
    mask = inside[:, None] & (column < PART.size)[None]
    tl.store(result + row[:, None] * PART.size + column[None], numbers, mask=mask)


@triton.jit
def move_kernel(
    words,
    source_blocks,
    source_offsets,
    target_blocks,
    target_offsets,
    num_entries,
    PART: tl.constexpr,
    N: tl.constexpr,
):
    """Grid: blocks of N entries."""
    entry = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = entry < num_entries
    source = tl.load(source_blocks + entry, mask=inside, other=0)
    target = tl.load(target_blocks + entry, mask=inside, other=0)
    source_slot = tl.load(source_offsets + entry, mask=inside, other=0)
    target_slot = tl.load(target_offsets + entry, mask=inside, other=0)
    NUM_WORDS: tl.constexpr = PART.size * PART.bits // 32
    word = tl.arange(0, triton.next_power_of_2(NUM_WORDS))
    mask = inside[:, None] & (word < NUM_WORDS)[None]
    step = PART.data + word[None] * PART.word_step
    data = tl.load(words + (source + source_slot * PART.slot_step)[:, None] + step, mask=mask)
    tl.store(words + (target + target_slot * PART.slot_step)[:, None] + step, data, mask=mask)
    NUM_SCALES: tl.constexpr = PART.groups * (2 if PART.code == INT4 else 1)
    halves = words.to(tl.pointer_type(tl.int16))
    for number in tl.static_range(NUM_SCALES):
        place = PART.scales + number * PART.page_size
        scale = tl.load(halves + source * 2 + place + source_slot, mask=inside)
        tl.store(halves + target * 2 + place + target_slot, scale, mask=inside)
