"""Who computes attention in steps of one token: SDPA, or one that reads pages where they are.

SDPA wants the entries of a row side by side: pages that are not neighbours are copied first.
Providers get the whole arena and page tables. They serve plain attention (no softcap, no sinks, no
bias, nothing to be added up) over pages in the dtype of the query; all else stays with SDPA.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import NativeArena

Tensor = torch.Tensor
CHOICES = ("sdpa", "flex", "xformers")
MAX_ROWS = 256  # of a call of flex: a size that is known when it is compiled
XFORMERS_PAGES = 64  # entries that its kernel for pages takes at once


class Held(NamedTuple):
    """What some rows hold in a layer, their newest entry included.

    Args:
        arena: where it is.
        pages: int64 [rows, width], page ids; what lies past a row's entries may be anything.
        sizes: int64 [rows], entries; at least 1.
    """

    arena: NativeArena
    pages: Int64s
    sizes: Int64s

    @property
    def counts(self) -> Int64s:
        """int64 [rows], pages."""
        return -(-self.sizes // self.arena.page_size)


class Provider(Protocol):
    """Attention of one new query of each row."""

    def takes(self, query: Tensor, entries: Held) -> bool:
        """Whether this can compute it."""

    def attend(self, query: Tensor, entries: Held, scale: float) -> Tensor:
        """[rows, heads, 1, size] of query [rows, heads, 1, head_dim]."""


def create(name: str, page_size: int) -> Provider | None:
    """The provider of a name; None for SDPA.

    Raises:
        ValueError: the name is unknown; something that it needs is missing.
    """
    if name not in CHOICES:
        raise ValueError(f"attention must be one of {', '.join(CHOICES)}, not {name!r}")
    if name == "flex":
        _check_flex()
        return Flex()
    if name == "xformers":
        _check_xformers(page_size)
        return Xformers()
    return None


def _check_flex() -> None:
    from torch._inductor import cpp_builder, exc

    if torch.cuda.is_available():
        return
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ValueError(
            "attention 'flex' is compiled and needs a C++ compiler (g++, or what CXX names): "
            "install one, or leave it at 'sdpa'"
        ) from None


def _check_xformers(page_size: int) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("attention 'xformers' needs the package xformers: pip install xformers")
    if not torch.cuda.is_available():
        raise ValueError("attention 'xformers' needs a CUDA GPU: there is none; use sdpa or flex")
    if page_size % XFORMERS_PAGES:
        raise ValueError(
            f"attention 'xformers' needs a page_size that is a multiple of {XFORMERS_PAGES}, "
            f"not {page_size}"
        )


def _fits(query: Tensor, entries: Held) -> bool:
    geometry = entries.arena.geometry
    same = query.dtype == geometry.key_dtype == geometry.value_dtype
    return same and not (torch.is_grad_enabled() and query.requires_grad)


class Flex:
    """flex_attention over the arena; a row's pages are the blocks of its block mask.

    The first calls take seconds: one of a single row and one of several rows are compiled, for each
    dtype and page size.
    """

    def __init__(self) -> None:
        self._end = torch.zeros(0, dtype=torch.int64)  # slot behind the last entry, by row

    def takes(self, query: Tensor, entries: Held) -> bool:
        """Whether this can compute it."""
        return _fits(query, entries) and len(query) <= MAX_ROWS

    def attend(self, query: Tensor, entries: Held, scale: float) -> Tensor:
        """[rows, heads, 1, size] of query [rows, heads, 1, head_dim]."""
        arena, (num_rows, heads, _, size) = entries.arena, query.shape
        keys, values = (
            tensor.flatten(1, 2)[None].expand(num_rows, -1, -1, -1)
            for tensor in (arena.keys, arena.values)
        )
        grouped = query.reshape(num_rows, arena.geometry.num_heads, -1, size)
        mask = self._mask(entries, grouped.shape[2], keys.shape[2], query.device)
        output = _compiled_flex()(grouped, keys, values, block_mask=mask, scale=scale)
        return output.reshape(num_rows, heads, 1, -1)

    def _mask(self, entries: Held, num_queries: int, num_slots: int, device: torch.device) -> Any:
        """Whole pages, and of each row the last one, up to its last entry."""
        from torch.nn.attention.flex_attention import BlockMask

        page_size, last = entries.arena.page_size, entries.counts - 1
        final = np.take_along_axis(entries.pages, last[:, None], 1)
        ends = np.zeros(MAX_ROWS, dtype=np.int64)
        ends[: len(last)] = final[:, 0] * page_size + entries.sizes - last * page_size
        num_pages = num_slots // page_size
        return BlockMask.from_kv_blocks(
            torch.ones(len(last), 1, 1, dtype=torch.int32, device=device),
            _wide(final, num_pages).to(device),
            torch.from_numpy(last.astype(np.int32)).to(device)[:, None, None],
            _wide(entries.pages, num_pages).to(device),
            BLOCK_SIZE=(128, page_size),
            mask_mod=_up_to(torch.from_numpy(ends).to(device)),
            seq_lengths=(num_queries, num_slots),
            compute_q_blocks=False,
        )


def _wide(pages: Int64s, num_pages: int) -> Tensor:
    """int32 [rows, 1, 1, num_pages] that begin with pages [rows, width].

    flex_attention wants as many columns as the arena has pages, and reads only those in use: the
    rows overlap, for an arena is much larger than a row.
    """
    num_rows, width = pages.shape
    if width == 1:  # a stride of 1 would be compiled again
        pages, width = np.pad(pages, ((0, 0), (0, 1))), 2
    numbers = np.zeros(num_rows * width + num_pages, dtype=np.int32)
    numbers[: num_rows * width] = pages.ravel()
    return torch.from_numpy(numbers).as_strided((num_rows, 1, 1, num_pages), (width, 1, 1, 1))


def _up_to(ends: Tensor) -> Any:
    # With a size known only at run time, the code that is made for CPUs does not compile.
    torch._dynamo.mark_static(ends)

    def is_held(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return slot < ends[row]

    return is_held


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


class Xformers:
    """xformers' attention over pages, on GPUs.

    Only its mask is tested here: no GPU was at hand.
    """

    def takes(self, query: Tensor, entries: Held) -> bool:
        """Whether this can compute it."""
        return _fits(query, entries) and query.dtype in (torch.float16, torch.bfloat16)

    def attend(self, query: Tensor, entries: Held, scale: float) -> Tensor:
        """[rows, heads, 1, size] of query [rows, heads, 1, head_dim]."""
        from xformers.ops import fmha

        num_rows, heads, _, size = query.shape
        kv_heads = entries.arena.geometry.num_heads
        group = heads // kv_heads
        # [1, slots, kv_heads, group, size]: no key is repeated
        keys, values = (
            tensor.flatten(1, 2).transpose(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
            for tensor in (entries.arena.keys, entries.arena.values)
        )
        output = fmha.memory_efficient_attention_forward(
            query.reshape(1, num_rows, kv_heads, group, size),
            keys,
            values,
            attn_bias=paged_bias(entries, [1] * num_rows, query.device),
            scale=scale,
            op=fmha.triton_splitk.FwOp,
        )
        return output.reshape(num_rows, heads, 1, -1)


def paged_bias(entries: Held, num_queries: list[int], device: torch.device) -> Any:
    """xformers' mask of the last num_queries [rows] entries of each row against its pages."""
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

    pages = np.maximum(entries.pages, 0)  # the sizes say what is not to be read
    return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        num_queries,
        entries.sizes.tolist(),
        torch.from_numpy(pages.astype(np.int32)).to(device),
        entries.arena.page_size,
        device=device,
    )
