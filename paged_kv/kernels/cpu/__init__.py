"""The C++ kernels, through ctypes: pointers and sizes go in, nothing of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from paged_kv.kernels.cpu import builds, expecting, selecting, structs
from paged_kv.kernels.index import Index, common_shape
from paged_kv.kernels.operands import DenseAttention, Expected, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.rotary import Rotary

Tensor = torch.Tensor


def available() -> bool:
    """Whether this machine has compiled kernels; warns once if it has not."""
    return kernels() is not None


@lru_cache(maxsize=1)
def kernels() -> CompiledKernels | None:
    """The best build for this CPU, or None."""
    library = builds.best()
    return None if library is None else CompiledKernels(library)


class CompiledKernels:
    """protocol.Kernels by one build.

    Args:
        library: a loaded build.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def write(
        self, blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        """Stores new entries, quantized as the layout says."""
        work = structs.WriteStruct(
            structs.blocks_struct(blocks, layout),
            keys.data_ptr(),
            values.data_ptr(),
            structs.DTYPES[keys.dtype],
            *keys.stride()[:2],
            *values.stride()[:2],
            slots.data_ptr(),
            len(slots),
        )
        _run(self.library.paged_kv_write, work, "slots", layout)

    def gather(
        self, stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor
    ) -> Tensor:
        """Numbers of whole pages, float32."""
        rows, columns = pages.shape
        heads = torch.arange(stack.shape[2])[:, None]
        index = (
            layers[:, None, None, None],
            pages[:, None],
            heads,
            torch.zeros((), dtype=torch.int64),
        )
        size = layout.key.size if part == "key" else layout.value.size
        numbers = torch.empty(len(layers), rows, stack.shape[2], columns * layout.page_size, size)
        self._entries("gather", stack, layout, part, numbers, source=index)
        return numbers

    def store(
        self, stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor
    ) -> None:
        """Stores numbers in slots."""
        self._entries("store", stack, layout, part, numbers.contiguous(), target=index)

    def move(
        self, stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index
    ) -> None:
        """Copies entries' bytes between slots."""
        self._entries("move", stack, layout, part, None, source, target)

    def _entries(
        self,
        name: str,
        stack: Tensor,
        layout: PageLayout,
        part: str,
        numbers: Tensor | None,
        source: Index | None = None,
        target: Index | None = None,
    ) -> None:
        shape = common_shape(*(source or ()), *(target or ()))
        # Kept until the call is over: the structs have addresses only.
        read, written = (
            [axis.expand(shape).contiguous() for axis in index or ()] for index in (source, target)
        )
        work = structs.EntriesStruct(
            structs.blocks_struct(stack, layout),
            part == "value",
            shape.numel(),
            structs.PlacesStruct(*(axis.data_ptr() for axis in read)),
            structs.PlacesStruct(*(axis.data_ptr() for axis in written)),
            None if numbers is None else numbers.data_ptr(),
        )
        _run(getattr(self.library, f"paged_kv_{name}"), work, "index", layout)

    def attend(
        self,
        output: Tensor,
        queries: Queries,
        segments: list[Segment],
        terms: Terms,
        side: Side,
    ) -> None:
        """Attention of new tokens to what their rows hold."""
        states, starts = queries
        described = [structs.segment_struct(segment) for segment in segments]
        tokens, heads, _ = states.shape
        work = structs.AttendStruct(
            output.data_ptr(),
            states.data_ptr(),
            structs.DTYPES[states.dtype],
            *output.stride()[:2],
            *states.stride()[:2],
            starts.data_ptr(),
            tokens,
            len(starts) - 1,
            heads,
            segments[0].blocks.shape[1],
            len(described),
            (structs.SegmentStruct * 2)(*described),
            terms.scale,
            terms.softcap,
            None if terms.sinks is None else terms.sinks.data_ptr(),
            structs.side_struct(side.weights),
            structs.side_struct(side.scores),
            side.decay,
        )
        _run(self.library.paged_kv_attend, work, "table", segments[0].layout)

    def attention_mass(self, attention: DenseAttention, largest: bool = False) -> Tensor:
        """What each entry gets from all queries of its KV head."""
        queries, keys, query_positions, key_positions, terms = attention.expanded()
        lead, (group, num_queries, size) = queries.shape[:-3], queries.shape[-3:]
        # Kept until the call is over: the struct has addresses only.
        operands = [
            None if operand is None else operand.contiguous()
            for operand in (queries, keys, terms.sinks, query_positions, key_positions)
        ]
        mass = torch.empty(key_positions.shape)
        work = structs.MassStruct(
            *(None if operand is None else operand.data_ptr() for operand in operands),
            mass.data_ptr(),
            lead.numel(),
            group * num_queries,
            keys.shape[-2],
            size,
            group,
            largest,
            terms.scale,
            terms.softcap,
        )
        _run(self.library.paged_kv_attention_mass, work, "", None)
        return mass

    def lowest(
        self, scores: Tensor, positions: Tensor, keep: Tensor, count: Tensor, limit: int
    ) -> Tensor:
        """The entries to go; see selection.lowest."""
        call = selecting.Lowest(scores, positions, keep, count, limit)
        _run(self.library.paged_kv_lowest, call.work, "", None)
        return call.chosen

    def pair_moves(
        self, losers: Tensor, freed: Tensor, limit: int, spare: int
    ) -> tuple[Tensor, Tensor]:
        """Which entries drop into which holes; see selection.pair_moves."""
        call = selecting.Pairs(losers, freed, limit, spare)
        _run(self.library.paged_kv_pair_moves, call.work, "", None)
        return call.source, call.target

    def first_places(self, mask: Tensor, limit: int) -> Tensor:
        """The first indices where a mask holds; see selection.first_places."""
        call = selecting.Pairs(mask, mask, limit, 0)
        _run(self.library.paged_kv_first_places, call.work, "", None)
        return call.source

    def expected_attention(
        self, keys: Tensor, values: Tensor, positions: Tensor, rotary: Rotary, expected: Expected
    ) -> Tensor:
        """What entries can expect; see reference.expected_attention."""
        call = expecting.Call(keys, values, positions, rotary, expected)
        _run(self.library.paged_kv_expected_attention, call.work, "", None)
        return call.found


_NO_MEMORY = 7
_MESSAGES = {
    1: "{what}: row {row} names page {value}, there are {pages}",
    2: "counts: row {row} has {value} entries, more than its table has pages for",
    3: "starts: row {row} ends at token {value}; they must rise from 0 to the number of tokens",
    4: "{what}: entry {row} is at slot {value}, outside its pages",
    5: "{what}: entry {row} is of layer {value}, there are {layers}",
    6: "{what}: entry {row} is of KV head {value}, there are {heads}",
}


def _run(function: Callable[[int], int], work: Any, what: str, layout: PageLayout | None) -> None:
    error = function(ctypes.addressof(work))
    if not error:
        return
    if error == _NO_MEMORY:
        raise MemoryError("no memory for a kernel's scratch")
    blocks = work.segments[0].blocks if what == "table" else work.blocks
    raise ValueError(
        _MESSAGES[error].format(
            what=what,
            row=work.bad_row,
            value=work.bad_value,
            pages=blocks.pages,
            layers=blocks.layers,
            heads=blocks.heads,
        )
    )
