"""The memory of pages: one pool per device, which any number of caches can share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.hf.allocator import Int64s, PageAllocator, PoolFull

Tensor = torch.Tensor
SIDE_DTYPES = {"positions": torch.int32, "weights": torch.float32, "scores": torch.float32}


class Geometry(NamedTuple):
    """What the pages of a model look like.

    Args:
        num_heads: KV heads.
        key_size: numbers of a key.
        value_size: numbers of a value.
        key_dtype: of a key's numbers.
        value_dtype: of a value's numbers.
        device: where the pages are.
    """

    num_heads: int
    key_size: int
    value_size: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device

    def page_bytes(self, page_size: int) -> int:
        """Bytes of the keys and values of one page."""
        entry = self.key_size * self.key_dtype.itemsize
        entry += self.value_size * self.value_dtype.itemsize
        return self.num_heads * page_size * entry


class Arena:
    """Pages of one geometry; a page is page_size entries of one layer in all of its KV heads.

    keys and values are [kv_heads, pages, page_size, size], so that the entries of neighbouring
    pages are a view [kv_heads, entries, size].

    Args:
        geometry: see Geometry.
        page_size: entries per page.
        capacity: pages.
    """

    def __init__(self, geometry: Geometry, page_size: int, capacity: int) -> None:
        self.geometry, self.page_size = geometry, page_size
        self.pages = PageAllocator(capacity)
        self.keys = self._zeros(geometry.key_dtype, geometry.key_size)
        self.values = self._zeros(geometry.value_dtype, geometry.value_size)
        self.side: dict[str, Tensor] = {}  # [kv_heads, pages, page_size] by name

    def _zeros(self, dtype: torch.dtype, *size: int) -> Tensor:
        # Zeros: what no entry has been written to is read where rows of a batch differ in length,
        # and masked; a NaN there would spread.
        shape = (self.geometry.num_heads, self.pages.capacity, self.page_size, *size)
        return torch.zeros(shape, dtype=dtype, device=self.geometry.device)

    def need_side(self, names: set[str]) -> None:
        """Keeps these beside the pages: positions, weights, scores."""
        for name in names - set(self.side):
            self.side[name] = self._zeros(SIDE_DTYPES[name])

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept per page, [kv_heads, pages, ...]."""
        return [self.keys, self.values, *self.side.values()]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's keys and values."""
        return self.geometry.page_bytes(self.page_size)

    @property
    def side_bytes(self) -> int:
        """Bytes that are kept beside the keys and values of a page."""
        numbers = self.geometry.num_heads * self.page_size
        return numbers * sum(tensor.element_size() for tensor in self.side.values())

    def resize(self, capacity: int, source: Int64s, target: Int64s) -> None:
        """Has so many pages from now on; copies pages from `source` to `target`, frees the rest.

        Args:
            capacity: pages.
            source: page ids before.
            target: page ids afterwards, in the same order.
        """
        old, before = self.pages, (self.keys, self.values, self.side)
        self.pages = PageAllocator(capacity)
        self.pages.references[target] = old.references[source]
        self.pages.num_held = len(target)
        read, write = (torch.from_numpy(ids).to(self.geometry.device) for ids in (source, target))
        self.keys = self._zeros(before[0].dtype, before[0].shape[-1])
        self.values = self._zeros(before[1].dtype, before[1].shape[-1])
        self.side = {name: self._zeros(tensor.dtype) for name, tensor in before[2].items()}
        for new, tensor in zip(self.tensors, [*before[:2], *before[2].values()], strict=True):
            new[:, write] = tensor[:, read]

    def copy(self, source: Int64s, target: Int64s) -> None:
        """Copies whole pages."""
        read, write = (torch.from_numpy(ids).to(self.geometry.device) for ids in (source, target))
        for tensor in self.tensors:
            tensor[:, write] = tensor[:, read]


def entries_of(tensor: Tensor, pages: Tensor) -> Tensor:
    """Entries of pages, copied: [..., kv_heads, n * page_size, ...].

    Args:
        tensor: of an arena, [kv_heads, pages, page_size, ...].
        pages: int64 [..., n], page ids.
    """
    heads, count = tensor.shape[:2]
    first = torch.arange(heads, device=tensor.device)[:, None] * count
    index = pages[..., None, :] + first  # [..., kv_heads, n]
    found = tensor.flatten(0, 1).flatten(1).index_select(0, index.flatten())  # whole pages at once
    size = (*index.shape[:-1], index.shape[-1] * tensor.shape[2], *tensor.shape[3:])
    return found.view(size)


class PagePool:
    """Pages for any number of caches and models on one device.

    Args:
        num_pages: most pages that may be held at once; None: as many as there is memory for.
        page_size: entries per page.

    Raises:
        ValueError: a number that is not an integer >= 1.
    """

    def __init__(self, num_pages: int | None = None, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value is None and name == "num_pages":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._arenas: dict[Geometry, Arena] = {}

    @property
    def num_held(self) -> int:
        """Pages in use."""
        return sum(arena.pages.num_held for arena in self._arenas.values())

    @property
    def num_free(self) -> float:
        """Pages that can still be had; infinite without a limit."""
        return math.inf if self.num_pages is None else self.num_pages - self.num_held

    @property
    def capacity_bytes(self) -> int:
        """Bytes of memory taken, for pages in use or not."""
        tensors = (tensor for arena in self._arenas.values() for tensor in arena.tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def arena(self, geometry: Geometry) -> Arena:
        """The pages of this geometry.

        Raises:
            ValueError: the pool's pages are on another device.
        """
        if geometry not in self._arenas:
            devices = {other.device for other in self._arenas}
            if devices - {geometry.device}:
                raise ValueError(
                    f"this PagePool has pages on {devices.pop()}; a pool per device is needed, "
                    f"another one for {geometry.device}"
                )
            self._arenas[geometry] = Arena(geometry, self.page_size, self.num_pages or 0)
        return self._arenas[geometry]

    def check(self, num_pages: int, why: str) -> None:
        """Raises PoolFull unless so many pages can be had.

        Args:
            num_pages: how many.
            why: what for.
        """
        if num_pages > self.num_free:
            raise PoolFull(
                f"num_pages {self.num_pages} is too small: {why} needs {num_pages} more pages, "
                f"{self.num_free} are free: give the PagePool at least "
                f"{self.num_held + num_pages}, lower the budget, or close other caches"
            )

    def free_memory(self) -> None:
        """Gives the memory back. No page may be held."""
        assert self.num_held == 0, "pages are held"
        self._arenas.clear()

    def check_integrity(self) -> None:
        """Asserts that free and held pages add up, and that the limit holds."""
        for arena in self._arenas.values():
            arena.pages.check_integrity()
        assert self.num_pages is None or self.num_held <= self.num_pages
