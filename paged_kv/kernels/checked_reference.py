"""packed_reference for who has no kernels: indices are checked, which the kernels do themselves."""

from __future__ import annotations

import torch

from paged_kv.kernels import packed_reference
from paged_kv.kernels.operands import Queries, Segment, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.pages import Index

Tensor = torch.Tensor


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See ops.write."""
    _inside("slots: slot", slots, len(blocks) * layout.page_size, lowest=None)
    packed_reference.write(blocks, layout, keys, values, slots)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """See ops.gather."""
    _inside("layers: layer", layers, len(stack))
    _inside("pages: page", pages, stack.shape[1])
    return packed_reference.gather(stack, layout, part, layers, pages)


def store(stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor) -> None:
    """See ops.store."""
    _index(stack, layout, index)
    packed_reference.store(stack, layout, part, index, numbers)


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """See ops.move."""
    _index(stack, layout, source)
    _index(stack, layout, target)
    packed_reference.move(stack, layout, part, source, target)


def attend(output: Tensor, queries: Queries, segments: list[Segment], terms: Terms) -> None:
    """See ops.attend."""
    starts = queries.starts.tolist()
    if starts != sorted(starts) or starts[0] < 0 or starts[-1] > len(queries.states):
        raise ValueError(f"starts {starts}: must rise from 0 to {len(queries.states)} tokens")
    counts = [segment.counts.tolist() for segment in segments]
    for row in range(len(starts) - 1):
        for segment, count in zip(segments, counts, strict=True):
            side = segment is segments[0] and (terms.weights, terms.scores) != (None, None)
            held = sum(own[row] for own in counts) if side else count[row]
            pages = -(-held // segment.layout.page_size)
            if count[row] < 0 or pages > segment.table.shape[1]:
                raise ValueError(
                    f"counts: row {row} has {held} entries, more than its table has pages for"
                )
            _inside("table: page", segment.table[row, :pages], len(segment.blocks))
            for beside in (terms.weights, terms.scores) if segment is segments[0] else ():
                if beside is not None:
                    _inside("table: page", segment.table[row, :pages], len(beside))
    packed_reference.attend(output, queries, segments, terms)


def _index(stack: Tensor, layout: PageLayout, index: Index) -> None:
    sizes = (*stack.shape[:3], layout.page_size)
    for what, found, size in zip(("layer", "page", "KV head", "offset"), index, sizes, strict=True):
        _inside(f"index: {what}", found, size)


def _inside(what: str, found: Tensor, size: int, lowest: int | None = 0) -> None:
    outside = found >= size if lowest is None else (found < lowest) | (found >= size)
    if outside.any():
        raise ValueError(f"{what} {int(found[outside][0])}, there are {size}")
