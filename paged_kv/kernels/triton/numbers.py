"""Numbers to bits and back, inside a kernel: what the codecs of paged_kv.quant do.

Written in integer arithmetic where a GPU has an instruction for it only from some generation on, or
rounds in another way than the codecs; so the bytes are the codecs' own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Codec.code of each format.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
INT8 = tl.constexpr(3)
INT4 = tl.constexpr(4)
FP8 = tl.constexpr(5)

INT8_LIMIT = tl.constexpr(127.0)
FP8_LIMIT = tl.constexpr(448.0)
LEVELS = tl.constexpr(15.0)
# Added to and taken from a number below 2**22, it leaves the nearest integer, half to even.
ROUNDER = tl.constexpr(12582912.0)
NO_LIMIT = tl.constexpr(float("inf"))


@triton.jit
def rotate(x, SIZE: tl.constexpr):
    """[n, columns], blocks of SIZE columns times the Hadamard matrix; see page_layout.rotate."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if SIZE > 1:
        for bit in tl.static_range(16):
            if (1 << bit) < SIZE:
                pairs = tl.reshape(x, (ROWS, COLUMNS // (2 << bit), 2, 1 << bit))
                low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
                pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
                x = tl.reshape(pairs, (ROWS, COLUMNS))
        x = x * SIZE**-0.5
    return x


@triton.jit
def load_numbers(words, block, offset, inside, PART: tl.constexpr):
    """float32 [n, columns]: entries as they are stored (rotated), 0 beyond them.

    Args:
        words: pointer to int32.
        block: int64 [n], the block's first word.
        offset: int64 [n], slot in the page.
        inside: bool [n], which entries to read.
        PART: see parts.PartLayout; columns is the next power of two of its size.
    """
    NUM_WORDS: tl.constexpr = PART.size * PART.bits // 32
    word = tl.arange(0, triton.next_power_of_2(NUM_WORDS))
    place = block[:, None] + PART.data + word[None] * PART.word_step
    place += offset[:, None] * PART.slot_step
    mask = inside[:, None] & (word < NUM_WORDS)[None]
    numbers = _unpack(tl.load(words + place, mask=mask, other=0), PART)
    if PART.groups > 0:
        numbers = _scaled(words, block, offset, inside, numbers, PART)
    return numbers


@triton.jit
def _unpack(words, PART: tl.constexpr):
    """float32 [n, columns] of int32 [n, words], without scales."""
    if PART.code == FLOAT32:
        return words.to(tl.float32, bitcast=True)
    COUNT: tl.constexpr = 32 // PART.bits
    shift = tl.arange(0, COUNT) * PART.bits
    bits = words[:, :, None] >> shift[None, None, :]
    bits = tl.reshape(bits, (words.shape[0], words.shape[1] * COUNT))
    if PART.code == BFLOAT16:
        return (bits << 16).to(tl.float32, bitcast=True)
    elif PART.code == FLOAT16:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif PART.code == INT8:
        return ((bits << 24) >> 24).to(tl.float32)
    elif PART.code == INT4:
        return (bits & 15).to(tl.float32)
    else:  # e4m3: a float16 with another bias
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _scaled(words, block, offset, inside, numbers, PART: tl.constexpr):
    """Numbers times their group's scale, plus its minimum where the format has one."""
    ROWS: tl.constexpr = numbers.shape[0]
    COLUMNS: tl.constexpr = numbers.shape[1]
    groups = _grouped(numbers, PART)
    place, mask = _scale_places(block, offset, inside, groups.shape[1], PART)
    halves = words.to(tl.pointer_type(tl.int16))
    groups *= _widened(tl.load(halves + place, mask=mask, other=0))[:, :, None]
    if PART.code == INT4:
        place += PART.groups * PART.page_size
        groups += _widened(tl.load(halves + place, mask=mask, other=0))[:, :, None]
    return tl.reshape(groups, (ROWS, COLUMNS))


@triton.jit
def _grouped(numbers, PART: tl.constexpr):
    """[n, groups, columns of a group]; with several groups, their sizes are powers of two."""
    COLUMNS: tl.constexpr = numbers.shape[1]
    SIZE: tl.constexpr = COLUMNS if PART.groups == 1 else PART.size // PART.groups
    return tl.reshape(numbers, (numbers.shape[0], COLUMNS // SIZE, SIZE))


@triton.jit
def _scale_places(block, offset, inside, GROUPS: tl.constexpr, PART: tl.constexpr):
    """(16-bit places, mask) [n, groups] of entries' scales."""
    group = tl.arange(0, GROUPS)
    place = (block * 2 + PART.scales + offset)[:, None] + group[None] * PART.page_size
    return place, inside[:, None] & (group < PART.groups)[None]


@triton.jit
def _widened(bits):
    """float32 of bfloat16 bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_numbers(words, block, offset, inside, numbers, PART: tl.constexpr):
    """Encodes and stores; numbers: float32 [n, columns], 0 beyond an entry. See load_numbers."""
    NUM_WORDS: tl.constexpr = PART.size * PART.bits // 32
    COUNT: tl.constexpr = 32 // PART.bits
    if PART.groups > 0:
        codes = _quantize(words, block, offset, inside, numbers, PART)
    else:
        codes = _native(numbers, PART)
    WORDS: tl.constexpr = numbers.shape[1] // COUNT
    shift = tl.arange(0, COUNT) * PART.bits
    parts = tl.reshape(codes, (numbers.shape[0], WORDS, COUNT)) << shift[None, None, :]
    word = tl.arange(0, WORDS)
    place = block[:, None] + PART.data + word[None] * PART.word_step
    place += offset[:, None] * PART.slot_step
    mask = inside[:, None] & (word < NUM_WORDS)[None]
    tl.store(words + place, tl.sum(parts, 2), mask=mask)  # no two have a bit in common


@triton.jit
def _native(numbers, PART: tl.constexpr):
    """int32 codes without scales."""
    if PART.code == FLOAT32:
        return numbers.to(tl.int32, bitcast=True)
    elif PART.code == BFLOAT16:
        return _bfloat16(numbers)
    else:
        half = numbers.to(tl.float16).to(tl.int16, bitcast=True)
        return half.to(tl.int32) & 0xFFFF


@triton.jit
def _quantize(words, block, offset, inside, numbers, PART: tl.constexpr):
    """int32 codes; stores the scales."""
    ROWS: tl.constexpr = numbers.shape[0]
    COLUMNS: tl.constexpr = numbers.shape[1]
    finite = (tl.min((tl.abs(numbers) < NO_LIMIT).to(tl.int32), 1) > 0)[:, None]
    groups = _grouped(rotate(numbers, PART.rotation), PART)
    halves = words.to(tl.pointer_type(tl.int16))
    place, mask = _scale_places(block, offset, inside, groups.shape[1], PART)
    if PART.code == INT4:
        # A minimum need not keep a NaN.
        known = tl.min((groups == groups).to(tl.int32), 2) > 0
        low = _rounded(tl.where(known, tl.min(groups, 2), float("nan")))
        high = tl.max(groups, 2) - low
        tl.store(halves + place + PART.groups * PART.page_size, _narrowed(low), mask=mask)
        finite = finite & (tl.abs(low) < NO_LIMIT)
    else:
        high = tl.max(tl.abs(groups), 2)
        low = tl.zeros_like(high)
    SYMMETRIC: tl.constexpr = INT8_LIMIT if PART.code == INT8 else FP8_LIMIT
    LIMIT: tl.constexpr = LEVELS if PART.code == INT4 else SYMMETRIC
    scale = _rounded(tl.div_rn(high, tl.full(high.shape, LIMIT, tl.float32)))
    finite = finite & (scale < NO_LIMIT)
    finite = finite & (tl.min((tl.abs(groups) < NO_LIMIT).to(tl.int32), 2) > 0)
    scale = tl.where(finite, scale, float("nan"))
    tl.store(halves + place, _narrowed(scale), mask=mask)
    usable = (scale > 0)[:, :, None]
    factor = tl.broadcast_to(tl.where(usable, scale[:, :, None], 1.0), groups.shape)
    ratio = tl.div_rn(groups - low[:, :, None], factor)
    codes = tl.where(usable, _codes(tl.where(usable, ratio, 0.0), PART), 0)
    return tl.reshape(codes, (ROWS, COLUMNS))


@triton.jit
def _codes(ratio, PART: tl.constexpr):
    """int32 codes of number / scale."""
    if PART.code == INT8:
        nearest = (tl.clamp(ratio, -INT8_LIMIT, INT8_LIMIT) + ROUNDER) - ROUNDER
        return nearest.to(tl.int32) & 0xFF
    elif PART.code == INT4:
        return ((tl.clamp(ratio, 0.0, LEVELS) + ROUNDER) - ROUNDER).to(tl.int32)
    else:
        bits = tl.clamp(ratio, -FP8_LIMIT, FP8_LIMIT).to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Three bits of the fraction stay, rounded half to even; the exponents' biases differ by
        # 120. Below 2**-6 the numbers are multiples of 2**-9.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        number = size.to(tl.float32, bitcast=True)
        small = ((number * 512.0 + ROUNDER) - ROUNDER).to(tl.int32)
        return tl.where(number < 0.015625, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _bfloat16(numbers):
    """int32, the bits of the nearest bfloat16, half to even; one NaN for all."""
    bits = numbers.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(numbers == numbers, nearest, 0x7FC0)


@triton.jit
def _rounded(numbers):
    """The nearest bfloat16, as float32."""
    return (_bfloat16(numbers) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(numbers):
    """int16, the bits of bfloat16."""
    return _bfloat16(numbers).to(tl.int16)
