"""Where the pages of growing tables lie: neighbours, if there is room, which are read in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Arena, Geometry
from paged_kv.hf.pool import PagePool


class ArenaLayers(NamedTuple):
    """Layers whose pages are in one arena.

    Args:
        arena: where they are.
        layers: int64, indices among those of the tables.
    """

    arena: Arena
    layers: Int64s


class GrowingTables:
    """Tables that grow, each as a run of neighbours as long as there is room.

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
        self._first: Int64s | None = None  # see PageTables.first

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
            counts = need[layers, rows]
            has_room = not counts.size or self._grows(part.arena, layers, rows, counts)
            if not has_room and self._is_alone(part):
                self._lay_out(part, self.count + need)
            for num in np.unique(counts):
                chosen = counts == num
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
        arena.copy(old.ravel(), new[:, :length].ravel())  # may fail, for lack of memory
        arena.allocator.take(new.ravel())
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
        pages = np.flatnonzero(arena.allocator.references)
        arena.resize(arena.allocator.capacity + num_pages, pages, pages)

    def _last(self, layers: Int64s, rows: Int64s) -> Int64s:
        """Last page of each of these tables; of an empty one, the page before its first."""
        count = self.count[layers, rows]
        last = self.ids[layers, rows, np.maximum(count, 1) - 1]
        return np.where(count > 0, last, self._start[layers, rows] - 1)

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
        num_pages = self.count[part.layers].sum()
        return self.is_private and part.arena.allocator.num_references == num_pages

    def _lay_out(self, part: ArenaLayers, count: Int64s, spare: int | None = None) -> None:
        """Memory of an arena for these tables alone: each a run, with room to grow.

        Args:
            part: the arena, and which tables are there.
            count: int64 [layers, rows], pages that each is to have soon; not fewer than now.
            spare: more free pages behind each; None: as many as suit.
        """
        ids, count = self.ids[part.layers], count[part.layers]
        mask = ids >= 0
        if len(np.unique(ids[mask])) < mask.sum():
            return  # shared pages are no runs
        room = count + (spare if spare is not None else 2 + (not self.is_bounded) * count // 4)
        start = (np.cumsum(room) - room.ravel()).reshape(count.shape)
        new = np.where(mask, start[..., None] + np.arange(ids.shape[2]), -1)
        part.arena.resize(int(room.sum()), ids[mask], new[mask])
        self.ids[part.layers], self._start[part.layers] = new, start
        self.changed()

    def _held(self, ids: Int64s) -> Iterator[tuple[Arena, Int64s]]:
        """Each arena with the pages in it of these tables, [layers, ...]."""
        for arena, layers in self.parts:
            pages = ids[layers]
            yield arena, pages[pages >= 0]
