"""Which pages are free: reference counts, and runs of neighbours.

Entries of a sequence whose pages are neighbours can be read where they lie, without a copy. So a
sequence gets its first pages as a run, as far from the next as there is room, and grows into the
gap behind it:

    | a a a a . . . . | b b b b . . . . |       b's next page is the one after its last
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class PoolFull(ValueError):
    """There are not enough free pages; says what is needed."""


class PageAllocator:
    """Page ids from 0 to capacity - 1, each free or held by one or more.

    Args:
        capacity: number of pages.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.references = np.zeros(capacity, dtype=np.int32)
        self.num_held = 0

    @property
    def capacity(self) -> int:
        """Pages, held or free."""
        return len(self.references)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self.capacity - self.num_held

    @property
    def num_references(self) -> int:
        """Holders of all pages, added up."""
        return int(self.references.sum())

    def grow(self, capacity: int) -> None:
        """Adds free pages at the end."""
        more = capacity - self.capacity
        self.references = np.concatenate([self.references, np.zeros(more, dtype=np.int32)])

    def find_runs(self, count: int, length: int) -> Int64s | None:
        """First pages of `count` runs of free neighbours, far apart; None if there is no room.

        Args:
            count: how many runs.
            length: pages in each.
        """
        starts, sizes = self._gaps()
        if not len(sizes) or (sizes // length).sum() < count:
            return None
        low, high = length, int(sizes.max())  # the largest distance that leaves room for all
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (sizes // middle).sum() >= count else (low, middle - 1)
        fits = sizes // low
        gap = np.repeat(np.arange(len(sizes)), fits)[:count]
        nth = np.arange(len(gap)) - np.repeat(np.cumsum(fits) - fits, fits)[:count]
        return np.asarray(starts[gap] + nth * low, dtype=np.int64)

    def find_free(self, count: int) -> Int64s:
        """The first `count` free pages, wherever they are."""
        return np.flatnonzero(self.references == 0)[:count].astype(np.int64)

    def are_free(self, pages: Int64s) -> npt.NDArray[np.bool_]:
        """Of each page, whether it exists and is free."""
        inside = pages < self.capacity
        free: Any = self.references[np.where(inside, pages, 0)] == 0 if self.capacity else False
        return np.asarray(inside & free)

    def take(self, pages: Int64s) -> None:
        """Free pages, all different, are held from now on."""
        assert (self.references[pages] == 0).all(), "a page is taken twice"
        self.references[pages] = 1
        self.num_held += pages.size

    def share(self, pages: Int64s) -> None:
        """Held pages have one holder more for each time that they occur."""
        assert (self.references[pages] > 0).all(), "a free page is shared"
        np.add.at(self.references, pages, 1)

    def release(self, pages: Int64s) -> None:
        """One holder fewer for each time that a page occurs; the last one frees it."""
        np.subtract.at(self.references, pages, 1)
        references = self.references[pages]
        assert (references >= 0).all(), "a page is released twice"
        self.num_held -= len(np.unique(pages[references == 0]))

    def check_integrity(self) -> None:
        """Asserts that free and held pages add up."""
        assert (self.references >= 0).all()
        assert self.num_held == np.count_nonzero(self.references)

    def _gaps(self) -> tuple[Int64s, Int64s]:
        """(first pages, lengths) of all runs of free pages, in order."""
        free = np.concatenate([[False], self.references == 0, [False]])
        edges = np.flatnonzero(free[1:] != free[:-1])
        return edges[0::2], edges[1::2] - edges[0::2]
