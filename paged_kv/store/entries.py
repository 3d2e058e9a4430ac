"""The keys, or the values, of pages: read and written by (layer, page, KV head, offset).

A stack is the pages of equal layers; one index operation serves all of them. Where a page's bytes
lie is the engine's business: vLLM has many layouts, transformers' arenas have one, and packed pages
(kernels.page_layout) are the same for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from paged_kv.kernels import ops
from paged_kv.kernels.index import NOWHERE, Index, region_index
from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor


class Number(NamedTuple):
    """What a stored element means: number * scale.

    Args:
        dtype: of the number; the pages' own, or an 8-bit float kept as bytes.
        scale: factor.
    """

    dtype: torch.dtype
    scale: float = 1.0


class Entries(ABC):
    """The keys, or the values, of a stack of pages.

    Args:
        num_layers: layers of the stack.
        num_pages: pages of each.
        num_heads: KV heads.
        page_size: entries per page.
        size: numbers of an entry.
        device: where they are.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_heads: int,
        page_size: int,
        size: int,
        device: torch.device,
    ) -> None:
        self.num_layers, self.num_pages, self.num_heads = num_layers, num_pages, num_heads
        self.page_size, self.size, self.device = page_size, size, device

    @abstractmethod
    def gather(self, layers: Tensor, pages: Tensor) -> Tensor:
        """Numbers of whole pages: float32 [layers, sequences, heads, n * page_size, size].

        Args:
            layers: int64 [layers].
            pages: int64 [sequences, n], page ids; or [layers, sequences, n].
        """

    @abstractmethod
    def take(self, index: Index) -> Tensor:
        """Numbers of some entries: float32 [..., size]."""

    @abstractmethod
    def move(self, source: Index, target: Index) -> None:
        """Copies entries' bits between slots, all read before any is written.

        Targets must be distinct, or get equal entries.
        """

    @abstractmethod
    def store(self, index: Index, numbers: Tensor, changed: Tensor | None = None) -> None:
        """Stores numbers.

        Args:
            index: places, distinct or with equal numbers; see Index.
            numbers: float32 [..., size].
            changed: bool, of the index's shape; the other places keep their bits. None: all.
        """


class NativeEntries(Entries):
    """Numbers as an engine's own pages have them.

    Args:
        stack: [layers, pages, heads, page_size, content], of any strides; or, with elements,
            [layers, pages, heads, page_size * content], an entry's elements scattered.
        columns: which of an entry's elements.
        number: what they mean.
        elements: int64 [page_size, content]: where in a page the elements of each entry lie.
    """

    def __init__(
        self, stack: Tensor, columns: slice, number: Number, elements: Tensor | None = None
    ) -> None:
        self.number = number
        self.elements = None
        view: Tensor | None = stack[..., columns] if elements is None else None
        if elements is not None:
            view = _strided(stack, elements[:, columns])
            self.elements = elements[:, columns] if view is None else None
        self.stack = stack if view is None else view
        page_size = stack.shape[3] if elements is None else len(elements)
        size = self.stack.shape[-1] if self.elements is None else self.elements.shape[-1]
        layers, pages, heads = stack.shape[:3]
        super().__init__(layers, pages, heads, page_size, size, stack.device)

    def gather(self, layers: Tensor, pages: Tensor) -> Tensor:
        """Numbers of whole pages; see Entries."""
        if self.elements is None:
            return self.decode(whole_pages(self.stack, layers, pages))
        index = region_index(layers, pages, self.num_heads, self.page_size)
        return self.decode(self.read(index)).flatten(-3, -2)

    def take(self, index: Index) -> Tensor:
        """Numbers of some entries: float32 [..., size]."""
        return self.decode(self.read(index))

    def move(self, source: Index, target: Index) -> None:
        """Copies entries' bits between slots; see Entries."""
        self.write(target, self.read(source))

    def store(self, index: Index, numbers: Tensor, changed: Tensor | None = None) -> None:
        """Stores numbers; what is out of range becomes the largest number."""
        bits = self.encode(numbers)
        if changed is not None:
            bits = torch.where(changed[..., None], bits, self.read(index))
        self.write(index, bits)

    def read(self, index: Index) -> Tensor:
        """The stored bits: [..., size]."""
        if self.elements is None:
            return self.stack[index]
        return self.stack[self._scattered(index)]

    def write(self, index: Index, bits: Tensor) -> None:
        """Stores bits as read gives them."""
        if self.elements is None:
            self.stack[index] = bits
        else:
            self.stack[self._scattered(index)] = bits

    def decode(self, bits: Tensor) -> Tensor:
        """float32 numbers of stored bits."""
        numbers = bits.view(self.number.dtype).float()
        return numbers if self.number.scale == 1.0 else numbers * self.number.scale

    def encode(self, numbers: Tensor) -> Tensor:
        """Bits for float32 numbers; what is out of range becomes the largest number."""
        limit = torch.finfo(self.number.dtype).max
        scaled = (numbers / self.number.scale).clamp(-limit, limit)
        return scaled.to(self.number.dtype).view(self.stack.dtype)

    def _scattered(self, index: Index) -> tuple[Tensor, ...]:
        layer, page, head, offset = index
        assert self.elements is not None
        places = layer[..., None], page[..., None], head[..., None]
        return (*places, self.elements.to(offset.device)[offset])


class PackedEntries(Entries):
    """Numbers in packed pages, which kernels read and write.

    Args:
        stack: uint8 [layers, pages, kv_heads, block_bytes].
        layout: of the blocks.
        part: "key" or "value".
    """

    def __init__(self, stack: Tensor, layout: PageLayout, part: str) -> None:
        self.stack, self.layout, self.part = stack, layout, part
        size = getattr(layout, part).size
        layers, pages, heads = stack.shape[:3]
        super().__init__(layers, pages, heads, layout.page_size, size, stack.device)

    def gather(self, layers: Tensor, pages: Tensor) -> Tensor:
        """Numbers of whole pages; see Entries."""
        if pages.dim() == 2 or len(pages) == 1:  # one table for all layers
            table = pages.flatten(0, -2)
            return ops.gather(self.stack, self.layout, self.part, layers, table)
        assert self.num_layers == 1, "tables that differ by layer are for layers in one arena"
        rows = pages.flatten(0, 1)
        numbers = ops.gather(self.stack, self.layout, self.part, layers[:1], rows)
        return numbers[0].unflatten(0, pages.shape[:2])

    def take(self, index: Index) -> Tensor:
        """Numbers of some entries: float32 [..., size]."""
        return ops.take(self.stack, self.layout, self.part, index)

    def move(self, source: Index, target: Index) -> None:
        """Copies entries' bits between slots; see Entries."""
        ops.move(self.stack, self.layout, self.part, source, target)

    def store(self, index: Index, numbers: Tensor, changed: Tensor | None = None) -> None:
        """Stores numbers, quantized as the layout says; see Entries."""
        if changed is not None:
            layer, page, head, offset = index
            index = layer, page, head, torch.where(changed, offset, NOWHERE)
        ops.store(self.stack, self.layout, self.part, index, numbers)


def whole_pages(stack: Tensor, layers: Tensor, pages: Tensor) -> Tensor:
    """Copies all that pages hold: [layers, sequences, heads, n * page_size, ...].

    Args:
        stack: [layers, pages, heads, page_size, ...], of any strides.
        layers: int64 [layers].
        pages: int64 [sequences, n], page ids; or [layers, sequences, n].
    """
    heads, page_size = stack.shape[2:4]
    block = stack.shape[3:].numel()
    steps = stack.stride()[:3]
    if any(step % block for step in steps) or not stack[0, 0, 0].is_contiguous():
        return stack[region_index(layers, pages, heads, page_size)].flatten(3, 4)
    # A page of a head lies in one piece: copied as such, several times as fast as entry by entry.
    layer_step, page_step, head_step = (step // block for step in steps)
    head = torch.arange(heads, device=pages.device)[:, None] * head_step
    place = layers[:, None, None, None] * layer_step + pages[..., None, :] * page_step + head
    last = sum((size - 1) * step for size, step in zip(stack.shape[:3], steps, strict=True))
    blocks = stack.as_strided((last // block + 1, block), (block, 1))
    size = (*place.shape[:3], place.shape[3] * page_size, *stack.shape[4:])
    return blocks.index_select(0, place.flatten()).view(size)


def _strided(stack: Tensor, elements: Tensor) -> Tensor | None:
    """The logical view [layers, pages, heads, page_size, size], where there is one."""
    first = int(elements[0, 0])
    steps = [int(elements[min(1, len(elements) - 1), 0]) - first, int(elements[0, 1]) - first]
    offset, column = (torch.arange(size) for size in elements.shape)
    if not torch.equal(elements, first + offset[:, None] * steps[0] + column * steps[1]):
        return None
    unit = stack.stride(-1)
    strides = (*stack.stride()[:-1], steps[0] * unit, steps[1] * unit)
    size = (*stack.shape[:-1], *elements.shape)
    return stack.as_strided(size, strides, stack.storage_offset() + first * unit)
