"""Operations on packed pages: checked, then given to the kernels that this machine has.

Everything wrong with sizes, dtypes and indices is a ValueError before memory is touched.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from paged_kv.kernels import checked_reference, checks, cpu, packed_reference, reference
from paged_kv.kernels.operands import Queries, Segment, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.pages import Index

Tensor = torch.Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(device: torch.device) -> Any:
    """Who does the work: the functions below, with operands that have been checked."""
    if device.type == "cuda" and _has_triton():
        from paged_kv.kernels import triton

        return triton
    found = cpu.kernels() if device.type == "cpu" else None
    return checked_reference if found is None else found


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Stores new entries, quantized as the layout says.

    Args:
        blocks: uint8 [pages, kv_heads, block_bytes] of one layer.
        layout: of the blocks.
        keys: [tokens, kv_heads, key_size], after RoPE; float32, bfloat16 or float16.
        values: [tokens, kv_heads, value_size].
        slots: int64 [tokens], page id * page_size + offset; negative for tokens to leave out.
            Distinct, or the entries are equal.
    """
    checks.write(blocks, layout, keys, values, slots)
    _kernels(blocks.device).write(blocks, layout, keys, values, slots)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of whole pages: float32 [layers, rows, kv_heads, pages * page_size, size].

    Args:
        stack: uint8 [layers, pages, kv_heads, block_bytes].
        layout: of the blocks.
        part: "key" or "value".
        layers: int64 [layers], indices in the stack.
        pages: int64 [rows, pages], page ids.
    """
    checks.gather(stack, layout, part, layers, pages)
    return _kernels(stack.device).gather(stack, layout, part, layers, pages)


def take(stack: Tensor, layout: PageLayout, part: str, index: Index) -> Tensor:
    """Keys or values of some entries: float32 [..., size], of the index's shape.

    Args:
        stack: see gather.
        layout: of the blocks.
        part: "key" or "value".
        index: see pages.Index.
    """
    checks.index(stack, layout, part, [index])
    return packed_reference.take(stack, layout, part, index)


def store(stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor) -> None:
    """Stores numbers in slots: what a merge made of entries.

    Args:
        stack: see gather.
        layout: of the blocks.
        part: "key" or "value".
        index: see pages.Index. Distinct places, or equal numbers.
        numbers: float32 [..., size], of the index's shape.
    """
    checks.index(stack, layout, part, [index])
    checks.numbers(numbers, layout, part, index)
    _kernels(stack.device).store(stack, layout, part, index, numbers)


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """Copies the bytes of entries between slots.

    Args:
        stack: see gather.
        layout: of the blocks.
        part: "key" or "value".
        source: which entries; see pages.Index.
        target: where to, in the same order. No place is both one entry's source and another's
            target; of equal targets the sources are equal.
    """
    checks.index(stack, layout, part, [source, target])
    _kernels(stack.device).move(stack, layout, part, source, target)


def attend(output: Tensor, queries: Queries, segments: list[Segment], terms: Terms) -> None:
    """Attention of new tokens to all that their rows hold, up to themselves.

    Args:
        output: [tokens, heads, value_size], of the queries' dtype; written.
        queries: see Queries.
        segments: one, or two; see Segment. Pages of a row beyond its count are not read.
        terms: see Terms.
    """
    checks.attend(output, queries, segments, terms)
    _kernels(output.device).attend(output, queries, segments, terms)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """What each entry gets from all queries of its KV head: float32 [..., kv_heads, entries].

    Args: see reference.attention_probabilities; with lead dimensions that broadcast.
    """
    kernels = _kernels(queries.device)
    if kernels is checked_reference or queries.dtype != torch.float32 or queries.shape[-1] % 16:
        kernels = reference
    terms = query_positions, key_positions, scale, softcap, sinks
    return kernels.attention_mass(queries, keys, *terms)
