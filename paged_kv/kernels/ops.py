"""Operations on packed pages and dense keys: checked, then given to this machine's kernels.

What the operands mean is said once, in protocol.Kernels. Everything wrong with sizes, dtypes and
indices is a ValueError before memory is touched.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from paged_kv.kernels import checks, cpu, packed_reference, reference, selection
from paged_kv.kernels.cpu import expecting
from paged_kv.kernels.index import Index
from paged_kv.kernels.operands import (
    NO_SIDE,
    DenseAttention,
    Expected,
    Queries,
    Segment,
    Side,
    Terms,
)
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.protocol import Kernels, Selection
from paged_kv.kernels.rotary import Rotary

Tensor = torch.Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(device: torch.device) -> Kernels:
    if device.type == "cuda" and _has_triton():
        from paged_kv.kernels import triton

        return triton
    compiled = cpu.kernels() if device.type == "cpu" else None
    return packed_reference if compiled is None else compiled


def _selection(device: torch.device) -> Selection:
    compiled = cpu.kernels() if device.type == "cpu" else None
    return selection if compiled is None else compiled


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Stores new entries, quantized as the layout says; see protocol.Kernels."""
    checks.write(blocks, layout, keys, values, slots)
    _kernels(blocks.device).write(blocks, layout, keys, values, slots)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of whole pages: float32 [layers, rows, kv_heads, pages * page_size, size].

    See protocol.Kernels.
    """
    checks.gather(stack, layout, part, layers, pages)
    return _kernels(stack.device).gather(stack, layout, part, layers, pages)


def take(stack: Tensor, layout: PageLayout, part: str, index: Index) -> Tensor:
    """Keys or values of some entries: float32 [..., size], of the index's shape.

    By torch everywhere: there are few.

    Args:
        stack: uint8 [layers, pages, kv_heads, block_bytes].
        layout: of the blocks.
        part: "key" or "value".
        index: see index.Index.
    """
    checks.index(stack, layout, part, [index])
    return packed_reference.take(stack, layout, part, index)


def store(stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor) -> None:
    """Stores numbers in slots: what a merge made of entries; see protocol.Kernels."""
    checks.index(stack, layout, part, [index])
    checks.numbers(numbers, layout, part, index)
    _kernels(stack.device).store(stack, layout, part, index, numbers)


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """Copies the bytes of entries between slots; see protocol.Kernels."""
    checks.index(stack, layout, part, [source, target])
    _kernels(stack.device).move(stack, layout, part, source, target)


def attend(
    output: Tensor,
    queries: Queries,
    segments: list[Segment],
    terms: Terms,
    side: Side = NO_SIDE,
) -> None:
    """Attention of new tokens to all that their rows hold; see protocol.Kernels."""
    checks.attend(output, queries, segments, terms, side)
    _kernels(output.device).attend(output, queries, segments, terms, side)


def attention_mass(attention: DenseAttention, largest: bool = False) -> Tensor:
    """What each entry gets from all queries of its KV head: float32 [..., kv_heads, entries].

    By torch for queries that are not float32 or whose head_dim is no multiple of 16.

    Args:
        attention: see DenseAttention.
        largest: the most that it gets from one query (of one query head), not the sum.
    """
    checks.dense(attention)
    queries = attention.queries
    if queries.dtype != torch.float32 or queries.shape[-1] % 16:
        return reference.attention_mass(attention, largest)
    return _kernels(queries.device).attention_mass(attention, largest)


def expected_attention(
    keys: Tensor, values: Tensor, positions: Tensor, rotary: Rotary, expected: Expected
) -> Tensor:
    """Attention that entries can expect, times the norm of the value; see reference.

    Args:
        keys: float32 [layers, events, kv_heads, m, head_dim], after RoPE.
        values: float32 [layers, events, kv_heads, m, size].
        positions: int64, broadcasts to [layers, events, kv_heads, m].
        rotary: the model's RoPE.
        expected: see Expected.

    Returns:
        float32 [layers, events, kv_heads, m].
    """
    compiled = cpu.kernels() if keys.device.type == "cpu" else None
    if compiled is None or not expecting.takes(keys):
        return reference.expected_attention(keys, values, positions, rotary, expected)
    return compiled.expected_attention(keys, values, positions, rotary, expected)


def lowest(scores: Tensor, positions: Tensor, keep: Tensor, count: Tensor, limit: int) -> Tensor:
    """The entries with the lowest (score, position): bool [..., m]; see selection.lowest."""
    return _selection(scores.device).lowest(scores, positions, keep, count, limit)


def pair_moves(losers: Tensor, freed: Tensor, limit: int, spare: int) -> tuple[Tensor, Tensor]:
    """Which entries drop into which holes: int64 [..., limit] each; see selection.pair_moves."""
    return _selection(losers.device).pair_moves(losers, freed, limit, spare)


def first_places(mask: Tensor, limit: int) -> Tensor:
    """The first indices where a mask holds: int64 [..., limit]; see selection.first_places."""
    return _selection(mask.device).first_places(mask, limit)
