"""Page formats: how the numbers of an entry are stored. One file each."""

from __future__ import annotations

import torch

from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.kernels.page_layout import Codec, PageLayout
from paged_kv.quant.fp8 import Fp8
from paged_kv.quant.int4 import Int4
from paged_kv.quant.int8 import Int8
from paged_kv.quant.native import Native

QUANTIZED: dict[str, type[Codec]] = {"int8": Int8, "int4": Int4, "fp8": Fp8}
assert (NATIVE, *QUANTIZED) == FORMATS
PAGE_SIZES = range(16, 129, 16)


def make_layout(
    name: str, dtype: torch.dtype, key_size: int, value_size: int, page_size: int
) -> PageLayout:
    """The layout of packed pages.

    Args:
        name: one of FORMATS.
        dtype: of the model's keys and values.
        key_size: numbers of a key.
        value_size: numbers of a value.
        page_size: slots per page.

    Raises:
        ValueError: no such format, or packed pages cannot have these sizes.
    """
    if name not in FORMATS:
        raise ValueError(f"page_format must be one of {', '.join(FORMATS)}, not {name!r}")
    for what, size in (("head_dim", key_size), ("head_dim", value_size)):
        if size < 16 or size % 16:
            raise ValueError(f"{what} {size}: packed pages need a multiple of 16")
    if page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size {page_size}: packed pages need a multiple of 16 from "
            f"{PAGE_SIZES[0]} to {PAGE_SIZES[-1]}"
        )
    if name == NATIVE:
        return PageLayout(Native(key_size, dtype), Native(value_size, dtype), page_size)
    codec = QUANTIZED[name]
    return PageLayout(codec(key_size), codec(value_size), page_size)
