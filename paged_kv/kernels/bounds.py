"""Indices that lie outside are a ValueError: for torch, the compiled kernels look themselves."""

from __future__ import annotations

import torch

from paged_kv.kernels.index import Index
from paged_kv.kernels.operands import Queries, Segment, Side
from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor


def inside(what: str, indices: Tensor, size: int, lowest: int | None = 0) -> None:
    """Raises if an index is below lowest (None: it may be negative), or not below size."""
    outside = indices >= size if lowest is None else (indices < lowest) | (indices >= size)
    if outside.any():
        raise ValueError(f"{what} {int(indices[outside][0])}, there are {size}")


def entries(stack: Tensor, layout: PageLayout, index: Index) -> None:
    """The index of ops.store and ops.move."""
    sizes = (*stack.shape[:3], layout.page_size)
    for what, axis, size in zip(("layer", "page", "KV head", "offset"), index, sizes, strict=True):
        inside(f"index: {what}", axis, size)


def rows(queries: Queries, segments: list[Segment], side: Side) -> None:
    """Starts, counts and page ids of ops.attend."""
    starts = queries.starts.tolist()
    if starts != sorted(starts) or starts[0] < 0 or starts[-1] > len(queries.states):
        raise ValueError(f"starts {starts}: must rise from 0 to {len(queries.states)} tokens")
    counts = torch.stack([segment.counts for segment in segments]).tolist()
    for number, segment in enumerate(segments):
        # The first table has the pages of all entries where side data lies there.
        beside = list(side.tensors.values()) if number == 0 else []
        for row, count in enumerate(counts[number]):
            num_entries = sum(column[row] for column in counts) if beside else count
            pages = -(-num_entries // segment.layout.page_size)
            if count < 0 or pages > segment.table.shape[1]:
                raise ValueError(
                    f"counts: row {row} has {num_entries} entries, more than its table has pages "
                    "for"
                )
            for numbers in (segment.blocks, *beside):
                inside("table: page", segment.table[row, :pages], len(numbers))
