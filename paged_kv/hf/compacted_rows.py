"""The rows of a cache give up what is above their budgets: as their schedules say, or for need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paged_kv.core.schedule import NEVER, Schedule
from paged_kv.hf import row_compaction
from paged_kv.hf.allocator import Int64s, PoolFull
from paged_kv.hf.marks import Marks
from paged_kv.hf.modes import keeps
from paged_kv.hf.rows import Rows


class CompactedRows(Rows):
    """Rows, their compactions, and marks: what a crop must have again."""

    def clear(self) -> None:
        """No rows; nothing is remembered. The pages must have been released."""
        super().clear()
        self.marks = Marks()

    @keeps
    def select_rows(self, indices: Sequence[int]) -> None:
        """Row i is what row indices[i] was: reorders, repeats and drops rows."""
        super().select_rows(indices)
        self.marks.select_rows(np.asarray(indices, dtype=np.int64))

    @keeps
    def compact(self, has_begun: bool = False, only: Int64s | None = None) -> None:
        """Every layer that holds more of a row than its schedule says gives up the surplus.

        Args:
            has_begun: whether a next step has begun; without it the rows are not as they were.
            only: rows to look at; None: all.

        Raises:
            PoolFull: see row_compaction.run.
        """
        for group, (schedule, layers) in enumerate(self.groups):
            if schedule is None:
                continue
            surplus = self._surplus(schedule, layers, self.starts)
            rows = np.flatnonzero(surplus)
            rows = rows if only is None else np.intersect1d(rows, only)
            if rows.size:
                with torch.autocast(self.device.type, enabled=False):
                    row_compaction.run(self, group, rows, surplus[rows])
                self.tables.trim()
                self.settled[rows] = self.num_tokens[rows] + has_begun
                self.marks.keep(self.settled, self.num_tokens)

    def compact_or_wait(self) -> None:
        """Now; without room for copies of shared pages before the next single token, or crop."""
        try:
            self.compact()
        except PoolFull:  # the tokens that came before it count all the same
            self.is_late = True

    def shrinkable(self) -> Int64s:
        """int64 [rows]: entries that each would give up, over all layers, by shrinking now.

        0 for those in a prompt, those that have shrunk, and where it would free no page: of pages
        that others hold, too, a row needs copies of its own first.
        """
        entries, freed, copies = np.zeros((3, self.num_rows), dtype=np.int64)
        if not self._is_at_rest:
            return entries
        shared = self.tables.shared().sum(2)
        for schedule, layers in self.groups:
            if schedule is None:
                continue
            surplus = self._surplus(schedule, layers, self.num_tokens)
            pages = -(-(self.size[layers] - surplus) // self.pool.page_size)
            entries += surplus * len(layers)
            freed += (self.tables.count[layers] - pages).sum(0)
            copies += (shared[layers] * (surplus > 0)).sum(0)
        may = (self.pressed == NEVER) & (self.num_tokens >= self.prompt_lens)
        return entries * (may & (freed > copies) & (copies <= self.pool.num_free))

    def shrink(self, rows: Int64s) -> None:
        """Some of the shrinkable rows are held to their budgets from now on.

        It happens between two steps: a crop can go back to what is left then, not behind it.

        Args:
            rows: int64 [n], which.
        """
        before = self.counters.evicted
        self.pressed[rows] = self.num_tokens[rows]
        self.compact(only=rows)
        gone = np.isin(np.arange(self.num_rows), rows)  # marks of now, which do not know it
        self.marks.keep(self.settled + gone, self.num_tokens)
        self.counters.shrunk += len(rows)
        self.counters.shrunk_entries += self.counters.evicted - before

    @property
    def _is_at_rest(self) -> bool:
        """Whether a compaction can come now: no step, no crop, no file whose model is unknown."""
        is_known = self.rotary is None or self.rotary.is_known or not self.reads_rotary
        is_whole = self.step is None and not self.is_torn
        return is_whole and self.may_shrink and not self.is_late and is_known

    def _surplus(self, schedule: Schedule, layers: Int64s, starts: Int64s) -> Int64s:
        """int64 [rows]: entries that a group of layers holds beyond what its schedule says.

        Args:
            schedule: of the group.
            layers: of the group.
            starts: int64 [rows], tokens from which each row is held to its budget.
        """
        evicted = schedule.evicted(self.num_tokens, starts)
        surplus: Int64s = self.size[layers[0]] - (self.num_tokens - evicted)
        return np.maximum(surplus, 0)
