"""What steps overwrite and crop must have again: last queries, the residual, scores.

It is remembered where a turn begins: at the last step of several tokens (a question), and at the
first step of a single token after it (an answer). Elsewhere crop can only take entries back.
"""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.hf import row_compaction
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.rows import Rows

Tensor = torch.Tensor
INSTEAD = (
    "use copy.deepcopy(cache) before them instead; or call cache.activate_past_recording() before "
    "anything else: then nothing is dropped until crop"
)


class Mark:
    """All rows of a cache before a step; whoever has it may share it.

    Args:
        rows: of the cache.
    """

    def __init__(self, rows: Rows) -> None:
        self.num_tokens = rows.num_tokens.copy()
        self.ring, self.residual = rows.ring.copy(), rows.residual.copy()
        self.scores: list[Tensor] = []  # of each arena: [kv_heads, layers, rows, width, page_size]
        if rows.reads_scores:
            for arena, layers in rows.tables.parts:
                pages = torch.from_numpy(np.maximum(rows.tables.ids[layers], 0))
                self.scores.append(arena.side["scores"][:, pages.to(arena.geometry.device)])

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        scores = sum(part.nbytes for part in self.scores)
        return self.ring.num_bytes + self.residual.num_bytes + scores

    def select_rows(self, indices: Int64s) -> Mark:
        """Row i of the new one is row indices[i] of this."""
        other = object.__new__(Mark)
        other.num_tokens = self.num_tokens[indices]
        other.ring, other.residual = self.ring.copy(), self.residual.copy()
        other.ring.select_rows(indices)
        other.residual.select_rows(indices)
        other.scores = [part[:, :, torch.from_numpy(indices)] for part in self.scores]
        return other

    def restore(self, rows: Rows) -> None:
        """A cache that has the same entries again has all as it was. Its pages are its own."""
        rows.ring, rows.residual = self.ring.copy(), self.residual.copy()
        for (arena, layers), scores in zip(rows.tables.parts, self.scores, strict=False):
            ids = rows.tables.ids[layers][:, :, : scores.shape[3]]
            mask = torch.from_numpy(ids >= 0).to(scores.device)
            pages = torch.from_numpy(ids[ids >= 0]).to(scores.device)
            arena.side["scores"][:, pages] = scores[:, :, :, : ids.shape[2]][:, mask]


class Marks:
    """The marks of a cache."""

    def __init__(self) -> None:
        self._by_kind: dict[bool, Mark] = {}  # of a question: True; of an answer: False
        self._is_prompt = True

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(mark.num_bytes for mark in self._by_kind.values())

    def note(self, rows: Rows, counts: Int64s) -> None:
        """A step of counts [rows] tokens is going to begin."""
        is_prompt = bool(counts.max(initial=0) > 1)
        begins = is_prompt or self._is_prompt
        self._is_prompt = is_prompt
        if begins and overwrites(rows) and rows.num_tokens.any():
            self._by_kind[is_prompt] = Mark(rows)

    def at(self, num_tokens: Int64s) -> Mark | None:
        """The mark where rows had so many tokens."""
        marks = self._by_kind.values()
        return next((mark for mark in marks if np.array_equal(mark.num_tokens, num_tokens)), None)

    def keep(self, least: Int64s, most: Int64s) -> None:
        """Forgets those where rows had fewer or more tokens than this."""
        self._by_kind = {
            kind: mark
            for kind, mark in self._by_kind.items()
            if (least <= mark.num_tokens).all() and (mark.num_tokens <= most).all()
        }

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        marks = self._by_kind.items()
        self._by_kind = {kind: mark.select_rows(indices) for kind, mark in marks if len(indices)}

    def copy(self) -> Marks:
        """Those of another cache that holds the same."""
        other = Marks()
        other._by_kind, other._is_prompt = dict(self._by_kind), self._is_prompt
        return other


def overwrites(rows: Rows) -> bool:
    """Whether steps overwrite what crop must have again.

    Where it is waited for (assisted decoding), it does not ask; a batch of requests has no turns.
    """
    has_rings = rows.ring.window > 0 or rows.residual_pages > 0
    is_final = not rows.waits_for_crop and not rows.knows_prompts
    return is_final and (has_rings or rows.reads_scores)


def check_crop(rows: Rows, marks: Marks, count: int) -> None:
    """Refuses a crop that would leave a trace of the last `count` tokens. Raises ValueError."""
    num_tokens = rows.num_tokens - count
    if (num_tokens < rows.settled).any():
        raise ValueError(
            f"crop(-{count}): a compaction that has seen some of the last {count} tokens has "
            f"dropped or merged entries for good: {INSTEAD}"
        )
    if not count or not overwrites(rows) or marks.at(num_tokens) is not None:
        return
    what = "scores" if rows.reads_scores else ""
    if rows.residual.has_lost(rows.num_tokens, num_tokens):
        what = "residual"
    elif _is_due(rows, count):
        what = "last queries"
    if what:
        raise ValueError(
            f"crop(-{count}): the {what} of that time have been overwritten; they are remembered "
            f"where a prompt of several tokens began, and its answer: {INSTEAD}"
        )


def remove(rows: Rows, marks: Marks, count: int) -> None:
    """The last `count` tokens of each row go; their entries are in its last slots.

    Raises:
        PoolFull: scores are in pages that others hold, and there is no room for copies; nothing has
            changed.
    """
    mark = marks.at(rows.num_tokens - count)
    if mark is not None and mark.scores:
        row_compaction.own(rows, np.arange(len(rows.layers)), np.arange(rows.num_rows))
    before = rows.num_tokens.copy()
    rows.size -= count
    rows.num_tokens -= count
    rows.tables.truncate(-(-rows.size // rows.pool.page_size))
    for ring in (rows.ring, rows.residual):
        ring.crop(before, rows.num_tokens)
    if mark is not None:
        mark.restore(rows)
    marks.keep(rows.settled, rows.num_tokens)


def _is_due(rows: Rows, count: int) -> bool:
    """Whether a compaction could come as soon as the last `count` tokens have gone.

    Where none is due, more tokens come before the next than have gone: as there was none meanwhile.
    Then all queries that the policy will look at come, too, or are still there.
    """
    num_tokens = rows.num_tokens - count
    for schedule, layers in rows.groups:
        if schedule is not None:
            evicted = schedule.evicted(num_tokens, np.zeros_like(num_tokens))
            if (rows.size[layers[0]] - count > num_tokens - evicted).any():
                return rows.ring.window > 0
    return False
