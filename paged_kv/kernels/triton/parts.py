"""Where the keys, or the values, of a packed page lie, as constants of a compiled kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.kernels.index import Index
from paged_kv.kernels.page_layout import SCALE_BYTES, WORD, PageLayout

INT4 = 4  # the only code with minimums; see Codec.code


class PartLayout(NamedTuple):
    """Places are counted from the block's first byte, in 32-bit words, scales in 16-bit ones.

    Args:
        code: see Codec.
        size: numbers of an entry.
        bits: of a number.
        groups: scales of an entry; none for native numbers.
        rotation: see Codec.
        page_size: slots per page.
        data: first word.
        scales: first scale; all groups' scales, then all their minimums.
        word_step: from a word of an entry to its next.
        slot_step: from a word to the next slot's.
    """

    code: int
    size: int
    bits: int
    groups: int
    rotation: int
    page_size: int
    data: int
    scales: int
    word_step: int
    slot_step: int


def part_layout(layout: PageLayout, part: str) -> PartLayout:
    """The keys ("key") or values ("value") of a layout."""
    is_key = part == "key"
    codec = layout.key if is_key else layout.value
    words = codec.data_bytes // WORD
    return PartLayout(
        code=codec.code,
        size=codec.size,
        bits=codec.data_bytes * 8 // codec.size,
        groups=codec.num_scales // (2 if codec.code == INT4 else 1),
        rotation=codec.rotation,
        page_size=layout.page_size,
        data=0 if is_key else layout.value_offset // WORD,
        scales=(layout.key_scale_offset if is_key else layout.value_scale_offset) // SCALE_BYTES,
        word_step=layout.page_size if is_key else 1,
        slot_step=1 if is_key else words,
    )


def places(words: torch.Tensor, index: Index) -> tuple[torch.Tensor, torch.Tensor]:
    """(first word of the block, offset in the page) of entries, int64 [n] each.

    Args:
        words: int32 [layers, pages, kv_heads, words], of any strides.
        index: see Index.
    """
    steps = words.stride()
    block = index[0] * steps[0] + index[1] * steps[1] + index[2] * steps[2]
    block, offset = torch.broadcast_tensors(block, index[3])
    # Of an expanded tensor reshape can be a view whose numbers all lie in one place.
    return block.reshape(-1).contiguous(), offset.reshape(-1).contiguous()
