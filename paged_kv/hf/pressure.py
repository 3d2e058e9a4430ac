"""Caches of a pool that has no pages left shrink: in which order; see CompactedRows."""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np

from paged_kv.hf.allocator import Int64s


class Shrinkable(Protocol):
    """A cache with start=pressure."""

    def shrinkable(self) -> Int64s:
        """int64 [rows]: entries that each can give up; 0: it cannot shrink."""

    def shrink(self, rows: Int64s) -> None:
        """Rows are held to their budgets from now on."""


class Waiting:
    """The caches of a pool that drop nothing before it is full; a cache goes with its last user."""

    def __init__(self) -> None:
        self._caches: WeakValueDictionary[int, Shrinkable] = WeakValueDictionary()
        self._ages = count()

    def __bool__(self) -> bool:
        return len(self._caches) > 0

    def add(self, cache: Shrinkable) -> None:
        """The youngest one."""
        self._caches[next(self._ages)] = cache

    def shrink_one(self) -> bool:
        """Whether there was a row to shrink: that of the largest surplus; of equal ones the oldest.

        A row's age is its cache's, then its index.
        """
        best, most = None, 0
        for _, cache in sorted(self._caches.items()):
            surplus = cache.shrinkable()
            if surplus.max(initial=0) > most:
                best, most = (cache, int(surplus.argmax())), int(surplus.max())
        if best is None:
            return False
        best[0].shrink(np.array([best[1]]))
        return True
