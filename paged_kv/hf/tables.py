"""Page tables: which pages each layer of each row holds, in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.pool import Arena, PagePool

Bools = npt.NDArray[np.bool_]
_NOWHERE = 1 << 40  # a page that no pool has


class PageTables:
    """Page tables of all layers and rows of a cache.

    ids is int64 [layers, rows, width], -1 past a table's end; count int64 [layers, rows].

    Args:
        pool: where pages come from.
        num_layers: layers that have pages.
        is_private: whether nobody else has pages of the pool, and it has no limit: then its memory
            is laid out for these tables alone.
        is_bounded: whether tables stop growing at some length; others get more room to grow into.
    """

    def __init__(self, pool: PagePool, num_layers: int, is_private: bool, is_bounded: bool) -> None:
        self.pool, self.is_private, self.is_bounded = pool, is_private, is_bounded
        self.arena: Arena | None = None  # known with the first keys
        self.ids = np.full((num_layers, 0, 0), -1, dtype=np.int64)
        self.count = np.zeros((num_layers, 0), dtype=np.int64)
        self._start = np.zeros((num_layers, 0), dtype=np.int64)  # where empty tables begin
        self._may_share = False
        self._first: Int64s | None = None
        self._spacing: list[int] = []
        self._num_pages = 0

    def _changed(self) -> None:
        self._first = None

    @property
    def first(self) -> Int64s:
        """int64 [layers, rows]: first page of each run of neighbours; -1 for other tables."""
        if self._first is None:
            index = np.arange(self.ids.shape[2])
            start = self.ids[:, :, :1]
            run = (self.ids == start + index) | (index >= self.count[..., None])
            self._first = np.where(run.all(-1), self.ids[:, :, :1].sum(-1), -1)
            self._num_pages = len(np.unique(self._held(self.ids)))
            self._spacing = [_spacing(first) for first in self._first]
        return self._first

    @property
    def spacing(self) -> list[int]:
        """By layer: pages between the runs of one row and the next; 0 if that differs."""
        return self._spacing if self.first is not None else []

    @property
    def num_pages(self) -> int:
        """Pages held; one that rows share counts once."""
        return self._num_pages if self.first is not None else 0

    def add_rows(self, num_rows: int) -> None:
        """Empty tables at the end."""
        self.ids = np.pad(self.ids, ((0, 0), (0, num_rows), (0, 0)), constant_values=-1)
        self.count = np.pad(self.count, ((0, 0), (0, num_rows)))
        self._start = np.pad(self._start, ((0, 0), (0, num_rows)), constant_values=_NOWHERE)
        self._changed()

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was; pages of rows that occur twice are shared."""
        new = self.ids[:, indices]
        if self.arena is not None:
            self._may_share |= len(np.unique(indices)) < len(indices)
            self.arena.pages.share(self._held(new))
            self.arena.pages.release(self._held(self.ids))
        self.ids, self.count = new, self.count[:, indices]
        self._start = self._start[:, indices]
        self._changed()

    def truncate(self, count: Int64s) -> None:
        """Keeps the first pages only: count [layers, rows]."""
        gone = np.arange(self.ids.shape[2]) >= np.minimum(count, self.count)[..., None]
        if self.arena is not None:
            self.arena.pages.release(self._held(np.where(gone, self.ids, -1)))
        self.ids = np.where(gone, -1, self.ids)
        self.count = np.minimum(count, self.count)
        self._changed()

    def shared(self) -> Bools:
        """bool [layers, rows, width]: pages that others hold, too."""
        if not self._may_share:
            return np.zeros(self.ids.shape, dtype=bool)
        found = (self.ids >= 0) & (self._arena.pages.references[np.maximum(self.ids, 0)] > 1)
        self._may_share = bool(found.any())
        return found

    def own(self, which: Bools) -> None:
        """Copies these shared pages, so that they can be written to: which [layers, rows, width].

        The pool must have room for as many pages.
        """
        arena = self._arena
        old = self.ids[which]
        if not old.size:
            return
        if arena.pages.num_free < old.size:
            self._grow(old.size)
        new = arena.pages.find_free(old.size)
        arena.pages.take(new)
        arena.copy(old, new)
        arena.pages.release(old)
        self.ids[which] = new
        self._changed()

    def extend(self, need: Int64s) -> None:
        """Adds pages: need [layers, rows]. The pool must have room for as many pages."""
        arena = self._arena
        if not need.any():
            return
        width = int((self.count + need).max())
        missing = width - self.ids.shape[2]
        if missing > 0:
            self.ids = np.pad(self.ids, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
        layers, rows = np.nonzero(need)
        if self.is_private and not self._grows(layers, rows, need[layers, rows]):
            self._lay_out(self.count + need)
        left = need[layers, rows]
        for num in np.unique(left):
            chosen = left == num
            self._extend(arena, layers[chosen], rows[chosen], int(num))
        self.count += need
        self._changed()

    def _extend(self, arena: Arena, layers: Int64s, rows: Int64s, num: int) -> None:
        """num more pages for each of these tables."""
        held = self.count[layers, rows]
        following = self._last(layers, rows)[:, None] + 1 + np.arange(num)
        grows = arena.pages.are_free(following).all(1)
        # Rows that share their last page want the same neighbour; only one can have it.
        grows &= np.isin(np.arange(len(held)), np.unique(following[:, 0], return_index=True)[1])
        arena.pages.take(following[grows].ravel())
        columns = held[:, None] + np.arange(num)
        self.ids[layers[grows, None], rows[grows, None], columns[grows]] = following[grows]
        for size in np.unique(held[~grows]):
            chosen = ~grows & (held == size)
            self._place(arena, layers[chosen], rows[chosen], int(size), num)

    def _place(self, arena: Arena, layers: Int64s, rows: Int64s, held: int, num: int) -> None:
        """num more pages for tables of `held` pages that have no free neighbour: they move."""
        length, count = held + num, len(layers)
        old = self.ids[layers, rows, :held]
        alone = bool((arena.pages.references[old] == 1).all())
        room = length + length // 4 + 2 if self.pool.num_pages is None else length
        starts = arena.pages.find_runs(count, room) if alone else None
        if starts is None and alone and self.pool.num_pages is None:
            self._grow(count * room)
            starts = arena.pages.find_runs(count, room)
        if starts is None:  # a crowded pool, or shared pages: wherever there is room
            if arena.pages.num_free < count * num:
                self._grow(count * num)
            more = arena.pages.find_free(count * num)
            arena.pages.take(more)
            self.ids[layers, rows, held:length] = more.reshape(count, num)
            return
        new = starts[:, None] + np.arange(length)
        arena.pages.take(new.ravel())
        arena.copy(old.ravel(), new[:, :held].ravel())
        arena.pages.release(old.ravel())
        self.ids[layers, rows, :length] = new

    def _grow(self, num_pages: int) -> None:
        """More memory for a pool without a limit."""
        assert self.pool.num_pages is None, "the pool must be checked before"
        arena = self._arena
        held = np.flatnonzero(arena.pages.references)
        arena.resize(arena.pages.capacity + num_pages, held, held)

    def _last(self, layers: Int64s, rows: Int64s) -> Int64s:
        """Last page of each of these tables; of an empty one, the page before its first."""
        held = self.count[layers, rows]
        last = self.ids[layers, rows, np.maximum(held, 1) - 1]
        return np.where(held > 0, last, self._start[layers, rows] - 1)

    def _grows(self, layers: Int64s, rows: Int64s, need: Int64s) -> bool:
        """Whether all of these tables have the pages that they need behind their last one."""
        last = self._last(layers, rows)[:, None]
        wanted = last + 1 + np.minimum(np.arange(need.max()), need[:, None] - 1)
        return bool(self._arena.pages.are_free(wanted).all())

    def trim(self) -> None:
        """Gives memory back that a pool of this cache alone has, but hardly needs."""
        if not self.is_private or self.arena is None:
            return
        least = int((self.count + 1).sum())
        most = least + self.count.size if self.is_bounded else 2 * least
        if self.arena.pages.capacity > most:
            self._lay_out(self.count, spare=1)

    def _lay_out(self, count: Int64s, spare: int | None = None) -> None:
        """Memory for these tables alone: each a run, with room to grow.

        Args:
            count: int64 [layers, rows], pages that each is to have soon; not fewer than now.
            spare: more free pages behind each; None: as many as suit.
        """
        ids = self._held(self.ids)
        if len(np.unique(ids)) < len(ids):
            return  # shared pages are no runs
        room = count + (spare if spare is not None else 2 + (not self.is_bounded) * count // 4)
        start = (np.cumsum(room) - room.ravel()).reshape(count.shape)
        new = np.where(self.ids >= 0, start[..., None] + np.arange(self.ids.shape[2]), -1)
        self._arena.resize(int(room.sum()), ids, self._held(new))
        self.ids, self._start = new, start
        self._changed()

    @property
    def _arena(self) -> Arena:
        assert self.arena is not None, "no keys yet"
        return self.arena

    @staticmethod
    def _held(ids: Int64s) -> Int64s:
        return ids[ids >= 0]


def _spacing(first: Int64s) -> int:
    steps = np.diff(first)
    even = len(steps) > 0 and (first >= 0).all() and (steps == steps[0]).all() and steps[0] > 0
    return int(steps[0]) if even else 0
