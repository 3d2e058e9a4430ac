"""Entries of pages by (layer, page, head, offset), wherever in a page their numbers lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""int64 (layer, page id, KV head, offset in the page), of shapes that broadcast."""


class Number(NamedTuple):
    """What a stored element means: number * scale.

    Args:
        dtype: of the number; the pages' own, or an 8-bit float kept as bytes.
        scale: factor.
    """

    dtype: torch.dtype
    scale: float = 1.0


class Part:
    """The keys, or the values, of a stack of pages.

    Args:
        stack: [layers, pages, heads, page_size, content], of any strides; or, with elements,
            [layers, pages, heads, page_size * content], an entry's elements scattered.
        columns: which of an entry's elements.
        number: what they mean.
        elements: int64 [page_size, content]: where in a page the elements of each entry lie.
    """

    def __init__(
        self,
        stack: torch.Tensor,
        columns: slice,
        number: Number,
        elements: torch.Tensor | None = None,
    ) -> None:
        self.number = number
        self.stack = stack
        self.elements = None
        if elements is None:
            self.stack = stack[..., columns]
        else:
            view = _strided(stack, elements[:, columns])
            if view is None:
                self.elements = elements[:, columns]
            else:
                self.stack = view
        self.num_heads = stack.shape[2]
        self.page_size = len(elements) if elements is not None else stack.shape[3]
        self.size = self.stack.shape[-1] if self.elements is None else self.elements.shape[-1]

    def gather(self, layers: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Numbers of whole pages: float32 [layers, sequences, heads, pages * page_size, size].

        Args:
            layers: int64 [layers].
            pages: int64 [sequences, pages], page ids.
        """
        index = region_index(layers, pages, self.num_heads, self.page_size)
        return self.decode(self.read(index)).flatten(-3, -2)

    def take(self, index: Index) -> torch.Tensor:
        """Numbers of some entries: float32 [..., size]."""
        return self.decode(self.read(index))

    def move(self, source: Index, target: Index) -> None:
        """Copies entries between slots, all read before any is written; see write."""
        self.write(target, self.read(source))

    def store(self, index: Index, numbers: torch.Tensor) -> None:
        """Stores float32 numbers; see write."""
        self.write(index, self.encode(numbers))

    def read(self, index: Index) -> torch.Tensor:
        """The stored bits: [..., size]."""
        if self.elements is None:
            return self.stack[index]
        return self.stack[self._scattered(index)]

    def write(self, index: Index, entries: torch.Tensor) -> None:
        """Stores bits as read gives them. Places must be distinct, or get equal entries."""
        if self.elements is None:
            self.stack[index] = entries
        else:
            self.stack[self._scattered(index)] = entries

    def decode(self, entries: torch.Tensor) -> torch.Tensor:
        """float32 numbers of stored bits."""
        numbers = entries.view(self.number.dtype).float()
        return numbers if self.number.scale == 1.0 else numbers * self.number.scale

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Bits to store for float32 numbers; what is out of range becomes the largest number."""
        limit = torch.finfo(self.number.dtype).max
        scaled = (numbers / self.number.scale).clamp(-limit, limit)
        return scaled.to(self.number.dtype).view(self.stack.dtype)

    def _scattered(self, index: Index) -> tuple[torch.Tensor, ...]:
        layer, page, head, offset = index
        assert self.elements is not None
        places = layer[..., None], page[..., None], head[..., None]
        return (*places, self.elements.to(offset.device)[offset])


def _strided(stack: torch.Tensor, elements: torch.Tensor) -> torch.Tensor | None:
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


class Pages:
    """Keys and values of a stack of equal layers; see Part.

    Args:
        stack: see Part.
        key_size: elements of a key; the rest of an entry is its value.
        key: what a key's elements mean.
        value: what a value's elements mean.
        elements: see Part.
    """

    def __init__(
        self,
        stack: torch.Tensor,
        key_size: int,
        key: Number,
        value: Number,
        elements: torch.Tensor | None = None,
    ) -> None:
        self.keys = Part(stack, slice(0, key_size), key, elements)
        self.values = Part(stack, slice(key_size, None), value, elements)
        self.num_layers, self.num_pages, self.num_heads = stack.shape[:3]
        self.page_size = self.keys.page_size
        self.device = stack.device


def region_index(layers: torch.Tensor, pages: torch.Tensor, heads: int, page_size: int) -> Index:
    """All slots of some pages, as index of [layers, sequences, heads, pages, page_size].

    Args:
        layers: int64 [layers].
        pages: int64 [sequences, pages], page ids.
        heads: number of KV heads.
        page_size: entries per page.
    """
    device = pages.device
    return (
        layers[:, None, None, None, None],
        pages[:, None, :, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(page_size, device=device),
    )


def slot_index(layers: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, size: int) -> Index:
    """Some slots of a region, as index of [layers, sequences, heads, columns].

    Args:
        layers: int64 [layers].
        pages: int64 [sequences, pages], page ids of each region.
        slots: int64 [layers, sequences, heads, columns], counted from the region's start.
        size: entries per page.
    """
    device = pages.device
    sequence = torch.arange(len(pages), device=device)[:, None, None]
    head = torch.arange(slots.shape[2], device=device)[:, None]
    return layers[:, None, None, None], pages[sequence, slots // size], head, slots % size


def entry_index(layers: torch.Tensor, pages: torch.Tensor, entries: Index, size: int) -> Index:
    """Some entries of a region, as index of [n].

    Args:
        layers: int64 [layers].
        pages: int64 [sequences, pages], page ids of each region.
        entries: int64 (layer, sequence, head, slot) of the region, [n] each.
        size: entries per page.
    """
    layer, sequence, head, slot = entries
    return layers[layer], pages[sequence, slot // size], head, slot % size
