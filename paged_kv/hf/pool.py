"""The memory of pages: one pool per device, which any number of caches can share."""

from __future__ import annotations

import math
from collections.abc import Callable

from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.hf.allocator import PoolFull
from paged_kv.hf.arena import Arena, Geometry, make_arena
from paged_kv.hf.pressure import Shrinkable, Waiting


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
        self._waiting = Waiting()

    @property
    def num_held(self) -> int:
        """Pages in use."""
        return sum(arena.allocator.num_held for arena in self._arenas.values())

    @property
    def num_free(self) -> float:
        """Pages that can still be had; infinite without a limit."""
        return math.inf if self.num_pages is None else self.num_pages - self.num_held

    @property
    def capacity_bytes(self) -> int:
        """Bytes of memory taken, for pages in use or not."""
        tensors = (tensor for arena in self._arenas.values() for tensor in arena.tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def arena(self, geometry: Geometry, grows: bool = False) -> Arena:
        """The pages of this geometry.

        Args:
            geometry: see Geometry.
            grows: whether memory is taken when it is needed even if there is a limit, which is one
                for all arenas: other geometries will have pages, too.

        Raises:
            ValueError: the pool's pages are on another device; the format cannot have these sizes.
        """
        if geometry not in self._arenas:
            devices = {other.device for other in self._arenas}
            if devices - {geometry.device}:
                raise ValueError(
                    f"this PagePool has pages on {devices.pop()}; a pool per device is needed, "
                    f"another one for {geometry.device}"
                )
            capacity = 0 if self._arenas or grows else self.num_pages or 0
            self._arenas[geometry] = make_arena(geometry, self.page_size, capacity)
        return self._arenas[geometry]

    def join(self, cache: Shrinkable) -> None:
        """A cache with start=pressure: its rows shrink before this pool is full."""
        self._waiting.add(cache)

    def make_room(self, needed: Callable[[], int]) -> None:
        """Caches shrink, as many rows as it takes, until there are enough pages; see Waiting.

        Args:
            needed: how many pages; asked again after each row, which may be one of who asks.
        """
        if self.num_pages is not None and self._waiting:
            while needed() > self.num_free and self._waiting.shrink_one():
                pass

    def check(self, num_pages: int, why: str) -> None:
        """Raises PoolFull unless so many pages can be had.

        Args:
            num_pages: how many.
            why: what for.
        """
        if num_pages > self.num_free:
            tried = "; with start=pressure no sequence is left that could shrink and free pages"
            raise PoolFull(
                f"num_pages {self.num_pages} is too small: {why} needs {num_pages} more pages, "
                f"{self.num_free} are free: give the PagePool at least "
                f"{self.num_held + num_pages}, lower the budget, or close other caches"
                f"{tried if self._waiting else ''}"
            )

    def free_memory(self) -> None:
        """Gives the memory back. No page may be held."""
        assert self.num_held == 0, "pages are held"
        self._arenas.clear()

    def check_integrity(self) -> None:
        """Asserts that free and held pages add up, and that the limit holds."""
        for arena in self._arenas.values():
            arena.allocator.check_integrity()
        assert self.num_pages is None or self.num_held <= self.num_pages
