"""A worker without a model (see worlds.py)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from world_swap import LabelCopier

from paged_kv.core.schedule import NEVER, Schedule
from paged_kv.policies.base import Events, Moves, PositionalPolicy
from paged_kv.policies.region import Region

Label = tuple[Any, ...]  # what was computed: (group, hash of the prefix) while nothing is evicted


class Scattering(PositionalPolicy):
    """Survivors all over the region: every page that a compaction may write is written."""

    def score(self, region: Region) -> torch.Tensor:
        raise NotImplementedError("labels have no tensors")

    def moves(self, events: Events) -> Moves:
        """As many as fit: whatever else the region holds is lost."""
        moves = []
        for event, (before, after, end) in enumerate(
            zip(events.evicted_before, events.evicted_after, events.num_tokens, strict=True)
        ):
            rng = random.Random(f"{before} {after} {end}")
            count = min(after - before, end - after)
            sources = sorted(rng.sample(range(before, after), count))
            targets = sorted(rng.sample(range(after, end), count))
            moves += [(event, *pair) for pair in zip(sources, targets, strict=True)]
        return Moves(*np.array(moves, dtype=np.int64).reshape(-1, 3).T)


def label_of(group: int, tokens: Sequence[int]) -> Label:
    """Of the last token, computed while nothing was evicted: depends on its prefix alone."""
    return group, hash(tuple(tokens))


@dataclass
class _Row:
    """A request in the worker."""

    tokens: list[int]
    tables: list[list[int]]  # page ids by group; only ever appended to
    num_old: int  # pages of each table that are older than this step
    run: int  # how often the request has begun: on arrival and after preemptions
    private: list[dict[int, Label]]  # by group: slot -> entry of a run of its own


@dataclass
class Worker:
    """Executes steps on pages of labels.

    Args:
        schedules: by group.
        pool: the scheduler's pool, to see what is shared when something is written.
        policy: picks the survivors.
        copier: for the swap; None without.
    """

    schedules: list[Schedule | None]
    pool: Any
    page_size: int
    policy: PositionalPolicy
    copier: LabelCopier | None = None
    pages: list[list[Label | None]] = field(init=False)
    rows: dict[str, _Row] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)  # of those that have one
    waits_for_pressure: bool = False
    reads: dict[str, list[list[int]]] = field(default_factory=dict)  # last: page ids by group
    num_events: int = 0
    num_copies: int = 0
    num_replaced: int = 0  # pages of running requests that became private
    num_snapshots: int = 0
    num_runs: int = 0
    num_resets: int = 0  # what is sampled then is not what it was

    def __post_init__(self) -> None:
        self.pages = [[None] * self.page_size for _ in self.pool.blocks]

    def execute(self, output: Any, hashed_before: set[int]) -> ModelRunnerOutput:
        """One step, in the order of the runner: copies, writes, reads, snapshots, compactions.

        The swap saves before all that, and loads before the writes.

        Args:
            output: what the scheduler wants.
            hashed_before: pages in the prefix cache before that was scheduled: not to be written.
        """
        if self.copier is not None:
            commands = output.kv_connector_metadata.commands
            self.copier.begin_step(commands, self.pages, self.rows)
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
        for source, target in output.kv_cache_block_copies or ():
            self.pages[target] = list(self.pages[source])
            self.num_copies += 1
        self._learn_starts(output)
        starts = self._update_rows(output)
        if self.copier is not None:
            self.copier.load(self.pages)
        chunks = {r: (starts[r], starts[r] + n) for r, n in output.num_scheduled_tokens.items()}
        for group in range(len(self.schedules)):
            for request_id, (start, end) in chunks.items():
                self._write(group, request_id, start, end, hashed_before)
            for request_id, (start, end) in chunks.items():
                self._read(group, request_id, start, end)
        for source, target in getattr(output, "paged_kv_snapshots", ()):
            self.pages[target] = list(self.pages[source])
            self.num_snapshots += 1
        for group in range(len(self.schedules)):
            for request_id, (start, end) in chunks.items():
                self._compact(group, request_id, start, end)
        return self._sample(chunks)

    def _learn_starts(self, output: Any) -> None:
        """What the scheduler says of the requests, and of pages that have been copied."""
        for request_id in output.finished_req_ids:
            self.starts.pop(request_id, None)
        told = getattr(output, "paged_kv_starts", {})
        assert not told.keys() & self.starts.keys(), "a start never changes"
        self.starts |= told
        for request_id, pages in getattr(output, "paged_kv_pages", {}).items():
            tables = self.rows[request_id].tables
            assert [*map(len, tables)] == [*map(len, pages)]
            self.num_replaced += sum(
                a != b
                for t, p in zip(tables, pages, strict=True)
                for a, b in zip(t, p, strict=True)
                if b
            )
            self.rows[request_id].tables = [list(ids) for ids in pages]

    def _update_rows(self, output: Any) -> dict[str, int]:
        starts = {}
        for row in self.rows.values():
            row.num_old = len(row.tables[0])
        for new in output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            if not self.waits_for_pressure:
                self.starts[new.req_id] = len(new.prompt_token_ids)
            self._begin(new.req_id, new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, new_ids, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            starts[request_id] = start
            if request_id in cached.resumed_req_ids:
                self._begin(request_id, cached.all_token_ids[request_id], new_ids, start)
            else:
                for table, ids in zip(self.rows[request_id].tables, new_ids or (), strict=False):
                    table.extend(ids)
        return starts

    def _begin(self, request_id: str, tokens: list[int], ids: Any, num_hits: int) -> None:
        tables = [list(table) for table in ids]
        num_old = num_hits // self.page_size
        kept = None if self.copier is None else self.copier.resume(request_id)
        if kept is not None:
            assert all(num_hits - 1 in entries for entries in kept.private)
            row = _Row(list(tokens), tables, num_old, kept.run, kept.private)
        else:
            self.num_runs += 1
            private = [
                {slot: label_of(group, tokens[: slot + 1]) for slot in range(num_hits)}
                for group in range(len(self.schedules))
            ]
            row = _Row(list(tokens), tables, num_old, self.num_runs, private)
        self.rows[request_id] = row

    def _evicted(self, group: int, request_id: str, num_tokens: int) -> int:
        schedule, start = self.schedules[group], self.starts.get(request_id, NEVER)
        return 0 if schedule is None else schedule.evicted(num_tokens, start)

    def _write(self, group: int, request_id: str, start: int, end: int, hashed: set[int]) -> None:
        row = self.rows[request_id]
        raw = self._evicted(group, request_id, start) == 0
        for slot in range(start, end):
            page, offset = self._place(group, row, slot)
            block = self.pool.blocks[page]
            assert not block.is_null
            if slot // self.page_size < row.num_old:
                assert page not in hashed, f"page {page} is hashed and written"
            label = label_of(group, row.tokens[: slot + 1])
            if not raw:
                label = (*label, request_id, row.run)  # depends on what was evicted
            self.pages[page][offset] = row.private[group][slot] = label

    def _read(self, group: int, request_id: str, start: int, end: int) -> None:
        row = self.rows[request_id]
        reads = self.reads.setdefault(request_id, [[] for _ in self.schedules])
        reads[group] = []
        for slot in range(self._evicted(group, request_id, start), end):
            page, offset = self._place(group, row, slot)
            reads[group].append(page)
            found, expected = self.pages[page][offset], row.private[group][slot]
            assert found == expected, f"{request_id} group {group} slot {slot} in page {page}"

    def _compact(self, group: int, request_id: str, start: int, end: int) -> None:
        before, after = (self._evicted(group, request_id, n) for n in (start, end))
        if after <= before:
            return
        self.num_events += 1
        row = self.rows[request_id]
        moves = self.policy.moves(Events(np.array([before]), np.array([after]), np.array([end])))
        pairs = list(zip(moves.source.tolist(), moves.target.tolist(), strict=True))
        places = [[self._place(group, row, slot) for slot in pair] for pair in pairs]
        entries = [self.pages[page][offset] for (page, offset), _ in places]
        for entry, (_, (page, offset)) in zip(entries, places, strict=True):
            block = self.pool.blocks[page]
            assert self.may_write(block), f"{request_id} compacts into shared page {page}"
            self.pages[page][offset] = entry
        kept = row.private[group]
        kept.update({target: kept[source] for source, target in pairs})

    def may_write(self, block: Any) -> bool:
        """Whether a compaction may write it: nobody else can see it."""
        return not block.is_null and block.block_hash is None and block.ref_cnt <= 1

    def _place(self, group: int, row: _Row, slot: int) -> tuple[int, int]:
        return row.tables[group][slot // self.page_size], slot % self.page_size

    def _sample(self, chunks: dict[str, tuple[int, int]]) -> ModelRunnerOutput:
        sampled = []
        for request_id, (_, end) in chunks.items():
            tokens = self.rows[request_id].tokens
            new = []
            if end == len(tokens):
                new = [next_token(tokens, self.num_resets)]
                tokens += new
            sampled.append(new)
        ids = list(chunks)
        output = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)
        if self.copier is not None:
            finished = self.copier.finished(bool(chunks))
            output.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=finished)
        return output


def next_token(tokens: Sequence[int], salt: int = 0) -> int:
    """The model: two words."""
    return 1 + hash((salt, *tokens)) % 2
