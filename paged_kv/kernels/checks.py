"""What operands of the operations on packed pages must be; everything else is a ValueError."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paged_kv.kernels.operands import Queries, Segment, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.pages import Index

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 2048  # numbers of a key or value
MAX_GROUP = 256  # query heads per KV head


def blocks(found: Tensor, layout: PageLayout, dims: int, what: str = "blocks") -> None:
    """uint8 [(layers,) pages, kv_heads, block_bytes] of the layout."""
    if found.dtype != torch.uint8 or found.dim() != dims or found.stride(-1) != 1:
        raise _wrong(what, found, f"{dims} dimensions of uint8, bytes of a block side by side")
    if found.shape[-1] != layout.block_bytes:
        raise _wrong(what, found, f"blocks of {layout.block_bytes} bytes, as the layout says")
    if max(layout.key.size, layout.value.size) > MAX_SIZE:
        raise ValueError(f"head_dim {layout.key.size}: packed pages hold at most {MAX_SIZE}")


def write(found: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Operands of ops.write."""
    blocks(found, layout, 3)
    heads = found.shape[1]
    for what, part, size in (
        ("keys", keys, layout.key.size),
        ("values", values, layout.value.size),
    ):
        if part.dtype not in DTYPES or part.dtype != keys.dtype:
            raise _wrong(what, part, f"one of {_names(DTYPES)}, the same for both")
        if part.shape != (len(slots), heads, size) or part.stride(-1) != 1:
            raise _wrong(what, part, f"[{len(slots)}, {heads}, {size}], numbers side by side")
    _vector("slots", slots, torch.int64)
    _same_device(found, keys, values, slots)


def part(name: str) -> None:
    """The name of a part of an entry."""
    if name not in ("key", "value"):
        raise ValueError(f"part must be key or value, not {name!r}")


def gather(stack: Tensor, layout: PageLayout, name: str, layers: Tensor, pages: Tensor) -> None:
    """Operands of ops.gather."""
    blocks(stack, layout, 4, "stack")
    part(name)
    _vector("layers", layers, torch.int64)
    if pages.dtype != torch.int64 or pages.dim() != 2:
        raise _wrong("pages", pages, "int64 [rows, pages]")
    _same_device(stack, layers, pages)


def index(stack: Tensor, layout: PageLayout, name: str, found: Sequence[Index]) -> None:
    """The stack and the indices of ops.store and ops.move."""
    blocks(stack, layout, 4, "stack")
    part(name)
    for one in found:
        for tensor in one:
            if tensor.dtype != torch.int64:
                raise _wrong("index", tensor, "int64")
        _same_device(stack, *one)


def numbers(found: Tensor, layout: PageLayout, name: str, places: Index) -> None:
    """The numbers of ops.store."""
    size = layout.key.size if name == "key" else layout.value.size
    wanted = (*torch.broadcast_shapes(*(tensor.shape for tensor in places)), size)
    if found.dtype != torch.float32 or found.shape != wanted:
        raise _wrong("numbers", found, f"float32 {list(wanted)}")


def attend(output: Tensor, queries: Queries, segments: list[Segment], terms: Terms) -> None:
    """Operands of ops.attend."""
    states, starts = queries
    if not 1 <= len(segments) <= 2:
        raise ValueError(f"segments: one or two, not {len(segments)}")
    first = segments[0]
    if states.dtype not in DTYPES or states.dim() != 3 or states.stride(-1) != 1:
        raise _wrong("queries", states, f"[tokens, heads, head_dim] of {_names(DTYPES)}")
    tokens, heads, size = states.shape
    if size != first.layout.key.size:
        raise _wrong("queries", states, f"head_dim {first.layout.key.size}, as the pages have")
    _vector("starts", starts, torch.int32)
    rows, kv_heads = len(starts) - 1, first.blocks.shape[1]
    if rows < 0 or heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise _wrong("queries", states, f"a multiple of {kv_heads} heads, at most {MAX_GROUP} each")
    wanted = (tokens, heads, first.layout.value.size)
    if output.dtype != states.dtype or output.shape != wanted or output.stride(-1) != 1:
        raise _wrong("output", output, f"{list(wanted)} of the queries' dtype")
    for one in segments:
        _segment(one, first, rows)
    _terms(terms, first, heads)
    if states.device != output.device or states.device != first.blocks.device:
        _same_device(states, output, first.blocks)


def _segment(found: Segment, first: Segment, rows: int) -> None:
    layout, table = found.layout, found.table
    blocks(found.blocks, layout, 3)
    sizes = (layout.key.size, layout.value.size, found.blocks.shape[1])
    if sizes != (first.layout.key.size, first.layout.value.size, first.blocks.shape[1]):
        raise ValueError(f"segments: both need one head_dim and number of KV heads, not {sizes}")
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != rows:
        raise _wrong("table", table, f"int32 [{rows}, pages]")
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise _wrong("table", table, "page ids of a row side by side")
    _vector("counts", found.counts, torch.int32)
    if len(found.counts) != rows:
        raise _wrong("counts", found.counts, f"int32 [{rows}]")


def _terms(terms: Terms, first: Segment, heads: int) -> None:
    if terms.softcap < 0:
        raise ValueError(f"softcap {terms.softcap}: must not be negative")
    if terms.sinks is not None:
        _vector("sinks", terms.sinks, torch.float32)
        if len(terms.sinks) != heads:
            raise _wrong("sinks", terms.sinks, f"float32 [{heads}]")
    for what, side in (("weights", terms.weights), ("scores", terms.scores)):
        if side is None:
            continue
        wanted = (first.blocks.shape[1], first.layout.page_size)
        if side.dtype != torch.float32 or side.dim() != 3 or side.shape[1:] != wanted:
            raise _wrong(what, side, f"float32 [pages, {wanted[0]}, {wanted[1]}]")
        if side.stride(2) != 1:
            raise _wrong(what, side, "slots of a page side by side")


def _vector(what: str, found: Tensor, dtype: torch.dtype) -> None:
    if found.dtype != dtype or found.dim() != 1 or not found.is_contiguous():
        raise _wrong(
            what, found, f"contiguous {str(dtype).removeprefix('torch.')} of one dimension"
        )


def _same_device(*tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"operands must be on one device, not {', '.join(sorted(devices))}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _wrong(what: str, found: Tensor, allowed: str) -> ValueError:
    dtype = str(found.dtype).removeprefix("torch.")
    strides = f", strides {list(found.stride())}"
    return ValueError(f"{what} is {dtype} {list(found.shape)}{strides}: needs {allowed}")
