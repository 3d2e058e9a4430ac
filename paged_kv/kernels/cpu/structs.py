"""What the C++ kernels are given: the structs of page.h, field by field."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, ClassVar

import torch

from paged_kv.kernels.operands import Segment
from paged_kv.kernels.page_layout import Codec, PageLayout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Number, Pointer = ctypes.c_int64, ctypes.c_void_p


def _numbers(names: str) -> list[Any]:
    return [(name, Number) for name in names.split()]


def _pointers(names: str) -> list[Any]:
    return [(name, Pointer) for name in names.split()]


class PartStruct(ctypes.Structure):
    """A codec."""

    _fields_: ClassVar = _numbers("format size data_bytes num_scales rotation")


class LayoutStruct(ctypes.Structure):
    """A page layout."""

    _fields_: ClassVar = [
        ("key", PartStruct),
        ("value", PartStruct),
        *_numbers("page_size block_bytes value_offset key_scale_offset value_scale_offset"),
    ]


class BlocksStruct(ctypes.Structure):
    """uint8 [layers, pages, heads, block_bytes]."""

    _fields_: ClassVar = [
        *_pointers("data layout"),
        *_numbers("layers pages heads layer_stride page_stride head_stride"),
    ]


class SegmentStruct(ctypes.Structure):
    """operands.Segment."""

    _fields_: ClassVar = [
        ("blocks", BlocksStruct),
        *_pointers("table"),
        *_numbers("table_stride columns"),
        *_pointers("counts"),
    ]


class SideStruct(ctypes.Structure):
    """float32 [pages, heads, page_size]."""

    _fields_: ClassVar = [*_pointers("data"), *_numbers("pages page_stride head_stride")]


class AttendStruct(ctypes.Structure):
    """attend."""

    _fields_: ClassVar = [
        *_pointers("output queries"),
        *_numbers("dtype output_token_stride output_head_stride"),
        *_numbers("query_token_stride query_head_stride"),
        *_pointers("starts"),
        *_numbers("tokens rows heads kv_heads num_segments"),
        ("segments", SegmentStruct * 2),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *_pointers("sinks"),
        ("weights", SideStruct),
        ("scores", SideStruct),
        ("decay", ctypes.c_double),
        *_numbers("bad_row bad_value"),
    ]


class WriteStruct(ctypes.Structure):
    """write."""

    _fields_: ClassVar = [
        ("blocks", BlocksStruct),
        *_pointers("keys values"),
        *_numbers("dtype key_token_stride key_head_stride value_token_stride value_head_stride"),
        *_pointers("slots"),
        *_numbers("tokens bad_row bad_value"),
    ]


class PlacesStruct(ctypes.Structure):
    """int64 [count] each."""

    _fields_: ClassVar = _pointers("layer page head offset")


class EntriesStruct(ctypes.Structure):
    """gather, store and move."""

    _fields_: ClassVar = [
        ("blocks", BlocksStruct),
        *_numbers("of_values count"),
        ("source", PlacesStruct),
        ("target", PlacesStruct),
        *_pointers("numbers"),
        *_numbers("bad_row bad_value"),
    ]


class MassStruct(ctypes.Structure):
    """attention_mass."""

    _fields_: ClassVar = [
        *_pointers("queries keys sinks query_positions key_positions mass"),
        *_numbers("heads queries_per_head entries size group largest"),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


class RowsStruct(ctypes.Structure):
    """[..., size], the numbers of a row side by side."""

    _fields_: ClassVar = [*_pointers("data"), ("strides", Number * 3)]


class LowestStruct(ctypes.Structure):
    """lowest."""

    _fields_: ClassVar = [
        *((name, RowsStruct) for name in ("scores", "positions", "keep", "count")),
        *_pointers("chosen"),
        ("sizes", Number * 3),
        *_numbers("size limit"),
    ]


class PairsStruct(ctypes.Structure):
    """pair_moves and first_places."""

    _fields_: ClassVar = [
        ("losers", RowsStruct),
        ("freed", RowsStruct),
        *_pointers("source target"),
        ("sizes", Number * 3),
        *_numbers("size limit spare"),
    ]


class ExpectedStruct(ctypes.Structure):
    """expected_attention."""

    _fields_: ClassVar = [
        *_pointers("keys values"),
        ("cos", RowsStruct),
        ("sin", RowsStruct),
        *_pointers("linear quadratic normaliser found"),
        ("sizes", Number * 3),
        *_numbers("entries size value_size half group neox"),
    ]


@lru_cache(maxsize=256)
def layout_struct(layout: PageLayout) -> tuple[LayoutStruct, int]:
    """(the struct, its address)."""

    def part(codec: Codec) -> PartStruct:
        sizes = codec.size, codec.data_bytes, codec.num_scales, codec.rotation
        return PartStruct(codec.code, *sizes)

    offsets = layout.value_offset, layout.key_scale_offset, layout.value_scale_offset
    parts = part(layout.key), part(layout.value)
    struct = LayoutStruct(*parts, layout.page_size, layout.block_bytes, *offsets)
    return struct, ctypes.addressof(struct)


def blocks_struct(blocks: torch.Tensor, layout: PageLayout) -> BlocksStruct:
    """Of uint8 [pages, heads, block_bytes], or with layers in front."""
    address = layout_struct(layout)[1]
    shape, strides = blocks.shape, blocks.stride()
    if len(shape) == 3:
        return BlocksStruct(blocks.data_ptr(), address, 1, *shape[:2], 0, *strides[:2])
    return BlocksStruct(blocks.data_ptr(), address, *shape[:3], *strides[:3])


def rows_struct(rows: torch.Tensor) -> RowsStruct:
    """Of [..., size] with at most three leading dimensions, size side by side."""
    strides = (0, 0, 0, *rows.stride()[:-1])[-3:]
    return RowsStruct(rows.data_ptr(), (Number * 3)(*strides))


def segment_struct(segment: Segment) -> SegmentStruct:
    """Of a segment."""
    blocks, layout, table, counts = segment
    struct = blocks_struct(blocks, layout)
    columns = table.shape[1]
    return SegmentStruct(struct, table.data_ptr(), table.stride(0), columns, counts.data_ptr())


def side_struct(side: torch.Tensor | None) -> SideStruct:
    """Of float32 [pages, kv_heads, page_size]."""
    if side is None:
        return SideStruct()
    return SideStruct(side.data_ptr(), side.shape[0], *side.stride()[:2])
