"""The memory of pages of one geometry: numbers as the model has them, or packed by a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from paged_kv.core.page_formats import NATIVE
from paged_kv.hf.allocator import Int64s, PageAllocator
from paged_kv.kernels import ops
from paged_kv.policies.base import Policy
from paged_kv.quant import make_layout
from paged_kv.store.entries import NativeEntries, Number
from paged_kv.store.pages import Pages, packed_pages
from paged_kv.store.side_data import DTYPES, SideData, names

Tensor = torch.Tensor


class Geometry(NamedTuple):
    """What the pages of a model look like.

    Args:
        num_heads: KV heads.
        key_size: numbers of a key.
        value_size: numbers of a value.
        key_dtype: of a key's numbers.
        value_dtype: of a value's numbers.
        device: where the pages are.
        page_format: how they are stored; see paged_kv.quant.
    """

    num_heads: int
    key_size: int
    value_size: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    page_format: str = NATIVE


class Arena(ABC):
    """Pages of one geometry; a page is page_size entries of one layer in all of its KV heads.

    For the store it is a stack of one layer: whose pages they are, the tables say.

    Args:
        geometry: see Geometry.
        page_size: entries per page.
        capacity: pages.
    """

    def __init__(self, geometry: Geometry, page_size: int, capacity: int) -> None:
        self.geometry, self.page_size = geometry, page_size
        self.allocator = PageAllocator(capacity)
        self.content: dict[str, Tensor] = {}  # keys and values, [kv_heads, pages, ...] by name
        self.side: dict[str, Tensor] = {}  # [kv_heads, pages, page_size] by name

    @property
    @abstractmethod
    def pages(self) -> Pages:
        """Keys and values, as the store reads and writes them."""

    @property
    def side_data(self) -> SideData:
        """What lies beside them."""
        return SideData({name: as_stack(tensor) for name, tensor in self.side.items()})

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Stores new entries.

        Args:
            keys: [kv_heads, tokens, key_size].
            values: [kv_heads, tokens, value_size].
            places: int64 [tokens], page * page_size + offset.
        """

    def _zeros(self, dtype: torch.dtype, *size: int, capacity: int | None = None) -> Tensor:
        # Zeros: what no entry has been written to is read where rows of a batch differ in length,
        # and masked; a NaN there would spread.
        num_pages = self.allocator.capacity if capacity is None else capacity
        shape = (self.geometry.num_heads, num_pages, *size)
        return torch.zeros(shape, dtype=dtype, device=self.geometry.device)

    def need_side(self, policy: Policy | None) -> None:
        """Keeps beside the pages what a policy needs."""
        for name in set(names(policy)) - set(self.side):
            self.side[name] = self._zeros(DTYPES[name], self.page_size)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept per page, [kv_heads, pages, ...]."""
        return [*self.content.values(), *self.side.values()]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's keys and values."""
        return sum(_page_bytes(tensor) for tensor in self.content.values())

    @property
    def side_bytes(self) -> int:
        """Bytes that are kept beside the keys and values of a page."""
        return sum(_page_bytes(tensor) for tensor in self.side.values())

    def resize(self, capacity: int, source: Int64s, target: Int64s) -> None:
        """Has so many pages from now on; copies pages from `source` to `target`, frees the rest.

        One tensor after the other, so that only one of them (keys, say) is there twice, and its
        pages in use once more, on their way. Without memory for that all is as it was: those that
        have moved go back, the last one first, in memory that was there a moment ago.

        Args:
            capacity: pages.
            source: page ids before, all that are held.
            target: page ids afterwards, in the same order.
        """
        allocator = PageAllocator(capacity)
        allocator.references[target] = self.allocator.references[source]
        allocator.num_held = len(target)
        read, write = (torch.from_numpy(ids).to(self.geometry.device) for ids in (source, target))
        places = [(part, name) for part in (self.content, self.side) for name in part]
        moved = 0
        try:
            for part, name in places:
                part[name] = self._moved(part[name], capacity, read, write)
                moved += 1
        except BaseException:
            for part, name in reversed(places[:moved]):
                part[name] = self._moved(part[name], self.allocator.capacity, write, read)
            raise
        self.allocator = allocator

    def _moved(self, tensor: Tensor, capacity: int, read: Tensor, write: Tensor) -> Tensor:
        """One of so many pages, in which `write` has what is in `read` of this."""
        new = self._zeros(tensor.dtype, *tensor.shape[2:], capacity=capacity)
        try:
            new[:, write] = tensor[:, read]
        except BaseException:
            del new  # the error holds this frame: its memory is wanted for the way back
            raise
        return new

    def copy(self, source: Int64s, target: Int64s) -> None:
        """Copies whole pages."""
        read, write = (torch.from_numpy(ids).to(self.geometry.device) for ids in (source, target))
        for tensor in self.tensors:
            tensor[:, write] = tensor[:, read]


class NativeArena(Arena):
    """Numbers as the model has them, in keys and values [kv_heads, pages, page_size, size].

    Entries of neighbouring pages are a view [kv_heads, entries, size].
    """

    def __init__(self, geometry: Geometry, page_size: int, capacity: int) -> None:
        super().__init__(geometry, page_size, capacity)
        self.content = {
            "keys": self._zeros(geometry.key_dtype, page_size, geometry.key_size),
            "values": self._zeros(geometry.value_dtype, page_size, geometry.value_size),
        }

    @property
    def pages(self) -> Pages:
        """Keys and values, as the store reads and writes them."""
        keys, values = (
            NativeEntries(as_stack(tensor), slice(None), Number(tensor.dtype))
            for tensor in (self.keys, self.values)
        )
        return Pages(keys, values)

    @property
    def keys(self) -> Tensor:
        """[kv_heads, pages, page_size, key_size]."""
        return self.content["keys"]

    @property
    def values(self) -> Tensor:
        """[kv_heads, pages, page_size, value_size]."""
        return self.content["values"]

    def write(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Stores new entries; see Arena."""
        for tensor, new in ((self.keys, keys), (self.values, values)):
            tensor.flatten(1, 2).index_copy_(1, places, new.to(tensor.dtype))


class PackedArena(Arena):
    """Blocks of bytes, [kv_heads, pages, block_bytes]; see paged_kv.kernels.page_layout."""

    def __init__(self, geometry: Geometry, page_size: int, capacity: int) -> None:
        super().__init__(geometry, page_size, capacity)
        self.layout = make_layout(
            geometry.page_format,
            geometry.key_dtype,
            geometry.key_size,
            geometry.value_size,
            page_size,
        )
        self.content = {"blocks": self._zeros(torch.uint8, self.layout.block_bytes)}

    @property
    def pages(self) -> Pages:
        """Keys and values, as the store reads and writes them."""
        return packed_pages(self.blocks[None], self.layout)

    @property
    def blocks(self) -> Tensor:
        """uint8 [pages, kv_heads, block_bytes], as the kernels take them: a view."""
        return self.content["blocks"].transpose(0, 1)

    def write(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Stores new entries, quantized; see Arena."""
        new = keys.transpose(0, 1), values.to(keys.dtype).transpose(0, 1)  # autocast may differ
        ops.write(self.blocks, self.layout, *new, places)


def make_arena(geometry: Geometry, page_size: int, capacity: int) -> Arena:
    """Memory for pages. Raises ValueError: the format cannot have these sizes."""
    kind = NativeArena if geometry.page_format == NATIVE else PackedArena
    return kind(geometry, page_size, capacity)


def as_stack(tensor: Tensor) -> Tensor:
    """[1, pages, kv_heads, ...] of [kv_heads, pages, ...]: a view."""
    return tensor.transpose(0, 1)[None]


def _page_bytes(tensor: Tensor) -> int:
    """Bytes of a page, of [kv_heads, pages, ...]."""
    return tensor.shape[0] * tensor.shape[2:].numel() * tensor.element_size()
