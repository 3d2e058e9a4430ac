"""Page tables: which pages each layer of each row holds, in order; what rows share."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.table_memory import GrowingTables

Bools = npt.NDArray[np.bool_]
_NOWHERE = 1 << 40  # a page that no pool has


class PageTables(GrowingTables):
    """Page tables of all layers and rows of a cache; see GrowingTables."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._spacing: list[int] = []
        self._num_pages: list[int] = []

    @property
    def first(self) -> Int64s:
        """int64 [layers, rows]: first page of each run of neighbours; -1 for other tables."""
        if self._first is None:
            index = np.arange(self.ids.shape[2])
            start = self.ids[:, :, :1]
            run = (self.ids == start + index) | (index >= self.count[..., None])
            self._first = np.where(run.all(-1), self.ids[:, :, :1].sum(-1), -1)
            self._num_pages = [len(np.unique(pages)) for _, pages in self._held(self.ids)]
            self._spacing = [_spacing(first) for first in self._first]
        return self._first

    @property
    def spacing(self) -> list[int]:
        """By layer: pages between the runs of one row and the next; 0 if that differs."""
        return self._spacing if self.first is not None else []

    @property
    def num_pages(self) -> int:
        """Pages held; one that rows share counts once."""
        return sum(self._num_pages) if self.first is not None else 0

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and values in the pages held, and of what lies beside them."""
        counts = self._num_pages if self.first is not None else []
        arenas = [part.arena for part in self.parts]
        pairs = list(zip(counts, arenas, strict=True))
        return (
            sum(count * arena.page_bytes for count, arena in pairs),
            sum(count * arena.side_bytes for count, arena in pairs),
        )

    def add_rows(self, num_rows: int) -> None:
        """Empty tables at the end."""
        self.ids = np.pad(self.ids, ((0, 0), (0, num_rows), (0, 0)), constant_values=-1)
        self.count = np.pad(self.count, ((0, 0), (0, num_rows)))
        self._start = np.pad(self._start, ((0, 0), (0, num_rows)), constant_values=_NOWHERE)
        self.changed()

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was; pages of rows that occur twice are shared."""
        new = self.ids[:, indices]
        self._may_share |= len(np.unique(indices)) < len(indices)
        for arena, pages in self._held(new):
            arena.allocator.share(pages)
        for arena, pages in self._held(self.ids):
            arena.allocator.release(pages)
        self.ids, self.count = new, self.count[:, indices]
        self._start = self._start[:, indices]
        self.changed()

    def copy(self) -> PageTables:
        """Somebody else's tables of the same pages: who writes to one copies it before."""
        other = copy.copy(self)
        other.parts, other._start = list(self.parts), self._start.copy()
        other._arenas = list(self._arenas)
        other.ids, other.count = self.ids.copy(), self.count.copy()
        for arena, pages in self._held(self.ids):
            arena.allocator.share(pages)
        self._may_share = other._may_share = True
        return other

    def truncate(self, count: Int64s) -> None:
        """Keeps the first pages only: count [layers, rows]."""
        gone = np.arange(self.ids.shape[2]) >= np.minimum(count, self.count)[..., None]
        for arena, pages in self._held(np.where(gone, self.ids, -1)):
            arena.allocator.release(pages)
        self.ids = np.where(gone, -1, self.ids)
        self.count = np.minimum(count, self.count)
        self.changed()

    def move_to_end(self, layer: int, row: int, start: int, end: int) -> None:
        """Pages [start, end) of a table become its last ones."""
        ids, count = self.ids[layer, row], self.count[layer, row]
        ids[:count] = np.concatenate([ids[:start], ids[end:count], ids[start:end]])
        self.changed()

    def shared(self) -> Bools:
        """bool [layers, rows, width]: pages that others hold, too."""
        mask = np.zeros(self.ids.shape, dtype=bool)
        if not self._may_share or not self.ids.size:
            return mask
        for arena, layers in self.parts:
            ids = self.ids[layers]
            mask[layers] = (ids >= 0) & (arena.allocator.references[np.maximum(ids, 0)] > 1)
        self._may_share = bool(mask.any())
        return mask

    def own(self, which: Bools) -> None:
        """Copies these shared pages, so that they can be written to: which [layers, rows, width].

        The pool must have room for as many pages.
        """
        for arena, layers in self.parts:
            place = layers[which[layers].nonzero()[0]], *which[layers].nonzero()[1:]
            old = self.ids[place]
            if not old.size:
                continue
            self.need(arena, old.size)
            new = arena.allocator.find_free(old.size)
            arena.copy(old, new)  # may fail, for lack of memory
            arena.allocator.take(new)
            arena.allocator.release(old)
            self.ids[place] = new
            self.changed()


def _spacing(first: Int64s) -> int:
    steps = np.diff(first)
    even = len(steps) > 0 and (first >= 0).all() and (steps == steps[0]).all() and steps[0] > 0
    return int(steps[0]) if even else 0
