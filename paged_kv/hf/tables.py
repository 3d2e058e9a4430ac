"""Page tables: which pages each layer of each row holds, in order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Arena, Geometry
from paged_kv.hf.pool import PagePool

Bools = npt.NDArray[np.bool_]
_NOWHERE = 1 << 40  # a page that no pool has


class ArenaLayers(NamedTuple):
    """Layers whose pages are in one arena.

    Args:
        arena: where they are.
        layers: int64, indices among those of the tables.
    """

    arena: Arena
    layers: Int64s


class PageTables:
    """Page tables of all layers and rows of a cache.

    ids is int64 [layers, rows, width], -1 past a table's end; count int64 [layers, rows].

    Args:
        pool: where pages come from.
        formats: page format of each layer that has pages.
        is_private: whether the pool is these tables' own, without a limit: as long as nobody else
            (a copy of them) has pages there, its memory is laid out for these tables alone.
        is_bounded: whether tables stop growing at some length; others get more room to grow into.
    """

    def __init__(
        self, pool: PagePool, formats: Sequence[str], is_private: bool, is_bounded: bool
    ) -> None:
        self.pool, self.is_private, self.is_bounded = pool, is_private, is_bounded
        self.formats = np.array(formats)
        self.parts: list[ArenaLayers] = []  # known with the first keys
        self._arenas: list[Arena] = []  # of each layer
        num_layers = len(formats)
        self.ids = np.full((num_layers, 0, 0), -1, dtype=np.int64)
        self.count = np.zeros((num_layers, 0), dtype=np.int64)
        self._start = np.zeros((num_layers, 0), dtype=np.int64)  # where empty tables begin
        self._may_share = False
        self._first: Int64s | None = None
        self._spacing: list[int] = []
        self._num_pages: list[int] = []

    def bind(self, geometry: Geometry) -> None:
        """The first keys have come. Raises ValueError: see PagePool.arena."""
        names = dict.fromkeys(self.formats.tolist())
        self.parts = [
            ArenaLayers(
                self.pool.arena(geometry._replace(page_format=name), grows=len(names) > 1),
                np.flatnonzero(self.formats == name),
            )
            for name in names
        ]
        arenas = {part.arena.geometry.page_format: part.arena for part in self.parts}
        self._arenas = [arenas[name] for name in self.formats.tolist()]

    def arena(self, layer: int) -> Arena:
        """Where a layer's pages are."""
        return self._arenas[layer]

    def changed(self, may_share: bool = False) -> None:
        """The tables have changed; may_share: there may be pages in them that others hold, too."""
        self._first = None
        self._may_share |= may_share

    @property
    def first(self) -> Int64s:
        """int64 [layers, rows]: first page of each run of neighbours; -1 for other tables."""
        if self._first is None:
            index = np.arange(self.ids.shape[2])
            start = self.ids[:, :, :1]
            run = (self.ids == start + index) | (index >= self.count[..., None])
            self._first = np.where(run.all(-1), self.ids[:, :, :1].sum(-1), -1)
            self._num_pages = [len(np.unique(held)) for _, held in self._held(self.ids)]
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
        held = list(zip(counts, arenas, strict=True))
        return (
            sum(count * arena.page_bytes for count, arena in held),
            sum(count * arena.side_bytes for count, arena in held),
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
        for arena, held in self._held(new):
            arena.allocator.share(held)
        for arena, held in self._held(self.ids):
            arena.allocator.release(held)
        self.ids, self.count = new, self.count[:, indices]
        self._start = self._start[:, indices]
        self.changed()

    def copy(self) -> PageTables:
        """Somebody else's tables of the same pages: who writes to one copies it before."""
        other = copy.copy(self)
        other.parts, other._start = list(self.parts), self._start.copy()
        other._arenas = list(self._arenas)
        other.ids, other.count = self.ids.copy(), self.count.copy()
        for arena, held in self._held(self.ids):
            arena.allocator.share(held)
        self._may_share = other._may_share = True
        return other

    def truncate(self, count: Int64s) -> None:
        """Keeps the first pages only: count [layers, rows]."""
        gone = np.arange(self.ids.shape[2]) >= np.minimum(count, self.count)[..., None]
        for arena, held in self._held(np.where(gone, self.ids, -1)):
            arena.allocator.release(held)
        self.ids = np.where(gone, -1, self.ids)
        self.count = np.minimum(count, self.count)
        self.changed()

    def move_to_end(self, layer: int, row: int, start: int, end: int) -> None:
        """Pages [start, end) of a table become its last ones."""
        own, count = self.ids[layer, row], self.count[layer, row]
        own[:count] = np.concatenate([own[:start], own[end:count], own[start:end]])
        self.changed()

    def shared(self) -> Bools:
        """bool [layers, rows, width]: pages that others hold, too."""
        found = np.zeros(self.ids.shape, dtype=bool)
        if not self._may_share or not self.ids.size:
            return found
        for arena, layers in self.parts:
            ids = self.ids[layers]
            found[layers] = (ids >= 0) & (arena.allocator.references[np.maximum(ids, 0)] > 1)
        self._may_share = bool(found.any())
        return found

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
            arena.allocator.take(new)
            arena.copy(old, new)
            arena.allocator.release(old)
            self.ids[place] = new
            self.changed()

    def extend(self, need: Int64s) -> None:
        """Adds pages: need [layers, rows]. The pool must have room for as many pages."""
        if not need.any():
            return
        width = int((self.count + need).max())
        missing = width - self.ids.shape[2]
        if missing > 0:
            self.ids = np.pad(self.ids, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
        for part in self.parts:
            nth, rows = np.nonzero(need[part.layers])
            layers = part.layers[nth]
            left = need[layers, rows]
            has_room = not left.size or self._grows(part.arena, layers, rows, left)
            if not has_room and self._is_alone(part):
                self._lay_out(part, self.count + need)
            for num in np.unique(left):
                chosen = left == num
                self._extend(part.arena, layers[chosen], rows[chosen], int(num))
        self.count += need
        self.changed()

    def _extend(self, arena: Arena, layers: Int64s, rows: Int64s, num: int) -> None:
        """num more pages for each of these tables: the neighbours of their last ones, if free.

        | a a a . . | b b b c c |      a grows in place; b's next page is taken: b moves
        """
        count = self.count[layers, rows]
        following = self._last(layers, rows)[:, None] + 1 + np.arange(num)
        grows = arena.allocator.are_free(following).all(1)
        # Rows that share their last page want the same neighbour; only one can have it.
        grows &= np.isin(np.arange(len(count)), np.unique(following[:, 0], return_index=True)[1])
        arena.allocator.take(following[grows].ravel())
        columns = count[:, None] + np.arange(num)
        self.ids[layers[grows, None], rows[grows, None], columns[grows]] = following[grows]
        # The others, those of equal length at once: their page ids are one array.
        for length in np.unique(count[~grows]):
            chosen = ~grows & (count == length)
            self._place(arena, layers[chosen], rows[chosen], int(length), num)

    def _place(self, arena: Arena, layers: Int64s, rows: Int64s, length: int, num: int) -> None:
        """num more pages for tables of `length` pages that have no free neighbour.

        before | a a a b b b . . . . . . . . |
        after  | . . . b b b a a a n . . . . |      a, with its new page n, where there is room
        """
        count, longer = len(layers), length + num
        old = self.ids[layers, rows, :length]
        # Pages that others hold, too, stay where they are: a copy would share nothing.
        is_alone = bool((arena.allocator.references[old] == 1).all())
        # In memory without a limit each gets room for more, so that it seldom moves again.
        is_unlimited = self.pool.num_pages is None
        room = longer + longer // 4 + 2 if is_unlimited else longer
        starts = arena.allocator.find_runs(count, room) if is_alone else None
        if starts is None and is_alone and is_unlimited:
            self._grow(arena, count * room)
            starts = arena.allocator.find_runs(count, room)
        if starts is None:  # a crowded pool, or shared pages: wherever there is room
            self.need(arena, count * num)
            more = arena.allocator.find_free(count * num)
            arena.allocator.take(more)
            self.ids[layers, rows, length:longer] = more.reshape(count, num)
            return
        new = starts[:, None] + np.arange(longer)
        arena.allocator.take(new.ravel())
        arena.copy(old.ravel(), new[:, :length].ravel())
        arena.allocator.release(old.ravel())
        self.ids[layers, rows, :longer] = new

    def need(self, arena: Arena, num_pages: int) -> None:
        """So many pages are free."""
        if self.pool.num_pages is None and arena.allocator.num_free < num_pages:
            self._grow(arena, num_pages)
        elif arena.allocator.num_free < num_pages:  # of several arenas under one limit
            self._grow(arena, num_pages - arena.allocator.num_free)

    def _grow(self, arena: Arena, num_pages: int) -> None:
        """More memory, of which the pool's limit has enough left."""
        limit = self.pool.num_pages
        assert limit is None or arena.allocator.capacity + num_pages <= limit, (
            "was not checked before"
        )
        held = np.flatnonzero(arena.allocator.references)
        arena.resize(arena.allocator.capacity + num_pages, held, held)

    def _last(self, layers: Int64s, rows: Int64s) -> Int64s:
        """Last page of each of these tables; of an empty one, the page before its first."""
        held = self.count[layers, rows]
        last = self.ids[layers, rows, np.maximum(held, 1) - 1]
        return np.where(held > 0, last, self._start[layers, rows] - 1)

    def _grows(self, arena: Arena, layers: Int64s, rows: Int64s, need: Int64s) -> bool:
        """Whether all of these tables have the pages that they need behind their last one."""
        last = self._last(layers, rows)[:, None]
        wanted = last + 1 + np.minimum(np.arange(need.max()), need[:, None] - 1)
        return bool(arena.allocator.are_free(wanted).all())

    def trim(self) -> None:
        """Gives memory back that a pool of this cache alone has, but hardly needs."""
        for part in filter(self._is_alone, self.parts):
            count = self.count[part.layers]
            least = int((count + 1).sum())
            most = least + count.size if self.is_bounded else 2 * least
            if part.arena.allocator.capacity > most:
                self._lay_out(part, self.count, spare=1)

    def _is_alone(self, part: ArenaLayers) -> bool:
        """Whether the memory of an arena is for these tables alone."""
        held = self.count[part.layers].sum()
        return self.is_private and part.arena.allocator.num_references == held

    def _lay_out(self, part: ArenaLayers, count: Int64s, spare: int | None = None) -> None:
        """Memory of an arena for these tables alone: each a run, with room to grow.

        Args:
            part: the arena, and which tables are there.
            count: int64 [layers, rows], pages that each is to have soon; not fewer than now.
            spare: more free pages behind each; None: as many as suit.
        """
        own, count = self.ids[part.layers], count[part.layers]
        held = own >= 0
        if len(np.unique(own[held])) < held.sum():
            return  # shared pages are no runs
        room = count + (spare if spare is not None else 2 + (not self.is_bounded) * count // 4)
        start = (np.cumsum(room) - room.ravel()).reshape(count.shape)
        new = np.where(held, start[..., None] + np.arange(own.shape[2]), -1)
        part.arena.resize(int(room.sum()), own[held], new[held])
        self.ids[part.layers], self._start[part.layers] = new, start
        self.changed()

    def _held(self, ids: Int64s) -> Iterator[tuple[Arena, Int64s]]:
        """Each arena with the pages in it of these tables, [layers, ...]."""
        for arena, layers in self.parts:
            own = ids[layers]
            yield arena, own[own >= 0]


def _spacing(first: Int64s) -> int:
    steps = np.diff(first)
    even = len(steps) > 0 and (first >= 0).all() and (steps == steps[0]).all() and steps[0] > 0
    return int(steps[0]) if even else 0
