"""The operations of protocol.Kernels on a GPU, in Triton. Imported only where there is one.

ops has checked the operands; nothing is copied to the host, so no call waits for the GPU.
"""

from __future__ import annotations

import torch

from paged_kv.kernels.index import Index
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.triton.attend import attend
from paged_kv.kernels.triton.copying import (
    gather_kernel,
    move_kernel,
    store_kernel,
    write_kernel,
)
from paged_kv.kernels.triton.mass import attention_mass
from paged_kv.kernels.triton.parts import PartLayout, part_layout, places

__all__ = ["attend", "attention_mass", "gather", "move", "store", "write"]

Tensor = torch.Tensor
ENTRIES = 16  # entries of a program: their words of a key lie together, 64 bytes
# A product and a sum in one rounding would give other bytes than the codecs. With fewer warps the
# numbers of large entries do not fit the registers.
EXACT = {"enable_fp_fusion": False, "num_warps": 8}


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Stores new entries; see protocol.Kernels."""
    words = blocks.view(torch.int32)
    num_tokens, num_heads = keys.shape[:2]
    if not num_tokens:
        return
    write_kernel[(-(-num_tokens // ENTRIES), num_heads, 2)](
        words,
        keys,
        values,
        slots,
        num_tokens,
        *words.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        KEY=part_layout(layout, "key"),
        VALUE=part_layout(layout, "value"),
        TOKENS=ENTRIES,
        **EXACT,
    )


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of whole pages; see protocol.Kernels."""
    words, place = stack.view(torch.int32), part_layout(layout, part)
    num_pages, num_heads = pages.numel(), stack.shape[2]
    shape = (len(layers), *pages.shape, num_heads, layout.page_size, place.size)
    result = torch.empty(shape, dtype=torch.float32, device=stack.device)
    if result.numel():
        gather_kernel[(len(layers) * num_pages, num_heads, layout.page_size // ENTRIES)](
            result,
            words,
            layers,
            pages.contiguous(),
            num_pages,
            *words.stride()[:3],
            PART=place,
            N=ENTRIES,
            **EXACT,
        )
    return result.transpose(2, 3).flatten(3, 4)


def store(stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor) -> None:
    """Stores entries that a merge has made; see protocol.Kernels."""
    words, place = stack.view(torch.int32), part_layout(layout, part)
    blocks, offsets = places(words, index)
    if len(blocks):
        store_kernel[(-(-len(blocks) // ENTRIES),)](
            words,
            blocks,
            offsets,
            numbers.reshape(-1, place.size).contiguous(),
            len(blocks),
            PART=place,
            N=ENTRIES,
            **EXACT,
        )


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """Copies the bytes of entries between slots; see protocol.Kernels."""
    words = stack.view(torch.int32)
    _move(words, part_layout(layout, part), places(words, source), places(words, target))


def _move(
    words: Tensor, part: PartLayout, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> None:
    num_entries = len(source[0])
    if num_entries:
        grid = (-(-num_entries // ENTRIES),)
        move_kernel[grid](words, *source, *target, num_entries, PART=part, N=ENTRIES, **EXACT)
