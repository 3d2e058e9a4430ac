"""What operands of the operations on packed pages must be; everything else is a ValueError."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paged_kv.kernels.index import Index, common_shape
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 2048  # numbers of a key or value
MAX_GROUP = 256  # query heads per KV head


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Operands of ops.write."""
    _blocks("blocks", blocks, layout, 3)
    heads = blocks.shape[1]
    for what, part, size in (
        ("keys", keys, layout.key.size),
        ("values", values, layout.value.size),
    ):
        if part.dtype not in DTYPES or part.dtype != keys.dtype:
            raise _wrong(what, part, f"one of {_names(DTYPES)}, the same for both")
        if part.shape != (len(slots), heads, size) or part.stride(-1) != 1:
            raise _wrong(what, part, f"[{len(slots)}, {heads}, {size}], numbers side by side")
    _vector("slots", slots, torch.int64)
    _same_device(blocks, keys, values, slots)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> None:
    """Operands of ops.gather."""
    _stack(stack, layout, part)
    _vector("layers", layers, torch.int64)
    if pages.dtype != torch.int64 or pages.dim() != 2:
        raise _wrong("pages", pages, "int64 [rows, pages]")
    _same_device(stack, layers, pages)


def index(stack: Tensor, layout: PageLayout, part: str, indices: Sequence[Index]) -> None:
    """The stack and the indices of ops.take, ops.store and ops.move."""
    _stack(stack, layout, part)
    for index in indices:
        for axis in index:
            if axis.dtype != torch.int64:
                raise _wrong("index", axis, "int64")
        _same_device(stack, *index)


def numbers(numbers: Tensor, layout: PageLayout, part: str, index: Index) -> None:
    """The numbers of ops.store."""
    size = layout.key.size if part == "key" else layout.value.size
    wanted = (*common_shape(*index), size)
    if numbers.dtype != torch.float32 or numbers.shape != wanted:
        raise _wrong("numbers", numbers, f"float32 {list(wanted)}")


def attend(
    output: Tensor, queries: Queries, segments: list[Segment], terms: Terms, side: Side
) -> None:
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
    for segment in segments:
        _segment(segment, first, rows)
    _softcap(terms)
    if terms.sinks is not None:
        _vector("sinks", terms.sinks, torch.float32)
        if len(terms.sinks) != heads:
            raise _wrong("sinks", terms.sinks, f"float32 [{heads}]")
    _side(side, first)
    if states.device != output.device or states.device != first.blocks.device:
        _same_device(states, output, first.blocks)


def dense(attention: DenseAttention) -> None:
    """Operands of ops.attention_mass."""
    queries, keys, query_positions, key_positions, terms = attention
    if not queries.is_floating_point() or queries.dim() < 4:
        raise _wrong("queries", queries, "floats [..., kv_heads, group, queries, head_dim]")
    lead, (group, num_queries, size) = queries.shape[:-3], queries.shape[-3:]
    if keys.dim() < 2 or keys.shape[-1] != size:
        raise _wrong("keys", keys, f"[..., kv_heads, entries, {size}], as the queries have")
    num_entries = keys.shape[-2]
    _broadcasts("keys", keys, queries.dtype, (*lead, num_entries, size))
    _broadcasts("query_positions", query_positions, torch.int64, (*lead, group, num_queries))
    _broadcasts("key_positions", key_positions, torch.int64, (*lead, num_entries))
    _softcap(terms)
    if terms.sinks is not None:
        _broadcasts("sinks", terms.sinks, torch.float32, (*lead, group))
        _same_device(queries, terms.sinks)
    _same_device(queries, keys, query_positions, key_positions)


def _blocks(what: str, blocks: Tensor, layout: PageLayout, dims: int) -> None:
    """uint8 [(layers,) pages, kv_heads, block_bytes] of the layout."""
    if blocks.dtype != torch.uint8 or blocks.dim() != dims or blocks.stride(-1) != 1:
        raise _wrong(what, blocks, f"{dims} dimensions of uint8, bytes of a block side by side")
    if blocks.shape[-1] != layout.block_bytes:
        raise _wrong(what, blocks, f"blocks of {layout.block_bytes} bytes, as the layout says")
    if max(layout.key.size, layout.value.size) > MAX_SIZE:
        raise ValueError(f"head_dim {layout.key.size}: packed pages hold at most {MAX_SIZE}")


def _stack(stack: Tensor, layout: PageLayout, part: str) -> None:
    _blocks("stack", stack, layout, 4)
    if part not in ("key", "value"):
        raise ValueError(f"part must be key or value, not {part!r}")


def _segment(segment: Segment, first: Segment, rows: int) -> None:
    layout, table = segment.layout, segment.table
    _blocks("blocks", segment.blocks, layout, 3)
    sizes = (layout.key.size, layout.value.size, segment.blocks.shape[1])
    if sizes != (first.layout.key.size, first.layout.value.size, first.blocks.shape[1]):
        raise ValueError(f"segments: both need one head_dim and number of KV heads, not {sizes}")
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != rows:
        raise _wrong("table", table, f"int32 [{rows}, pages]")
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise _wrong("table", table, "page ids of a row side by side")
    _vector("counts", segment.counts, torch.int32)
    if len(segment.counts) != rows:
        raise _wrong("counts", segment.counts, f"int32 [{rows}]")


def _softcap(terms: Terms) -> None:
    if terms.softcap < 0:
        raise ValueError(f"softcap {terms.softcap}: must not be negative")


def _side(side: Side, first: Segment) -> None:
    wanted = (first.blocks.shape[1], first.layout.page_size)
    if not 0 < side.decay <= 1:
        raise ValueError(f"decay {side.decay}: must be above 0 and at most 1")
    for what, numbers in side.tensors.items():
        if numbers.dtype != torch.float32 or numbers.dim() != 3 or numbers.shape[1:] != wanted:
            raise _wrong(what, numbers, f"float32 [pages, {wanted[0]}, {wanted[1]}]")
        if numbers.stride(2) != 1:
            raise _wrong(what, numbers, "slots of a page side by side")


def _vector(what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise _wrong(what, tensor, f"contiguous {_names([dtype])} of one dimension")


def _broadcasts(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As Tensor.expand wants it."""
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    fits = tensor.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in pairs)
    if tensor.dtype != dtype or not fits:
        raise _wrong(what, tensor, f"{_names([dtype])} that broadcasts to {list(shape)}")


def _same_device(*tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"operands must be on one device, not {', '.join(sorted(devices))}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _wrong(what: str, tensor: Tensor, allowed: str) -> ValueError:
    shape, strides = list(tensor.shape), list(tensor.stride())
    return ValueError(
        f"{what} is {_names([tensor.dtype])} {shape}, strides {strides}: needs {allowed}"
    )
