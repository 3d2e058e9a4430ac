"""The worker's side of the swap, of labels: what Copier and SwapTiers do with bytes."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paged_kv.vllm.swap.commands import (
    Capacity,
    Command,
    Demote,
    Finished,
    Forget,
    Load,
    Promote,
    Save,
)

FAILURES = 0.05  # of all jobs
LOST = "lost"  # what a failed job leaves in its slots


@dataclass
class _Job:
    """Moves slots of a request between the tiers."""

    command: Demote | Promote
    forgotten: bool = False

    @property
    def host_slots(self) -> tuple[int, ...]:
        is_demotion = isinstance(self.command, Demote)
        return self.command.source if is_demotion else self.command.target


class Tiers:
    """One rank's: jobs are done in their order, by and by.

    Args:
        capacity: slots.
        rng: which jobs fail.
    """

    def __init__(self, capacity: Capacity, rng: random.Random) -> None:
        self.host: list[Any] = [LOST] * capacity.host_slots
        self.file: list[Any] = [LOST] * capacity.file_slots
        self._rng = rng
        self._jobs: deque[_Job] = deque()
        self._failed: set[str] = set()
        self._news: tuple[set[str], set[str]] = (set(), set())  # promoted, failed

    def add(self, command: Demote | Promote) -> None:
        self._jobs.append(_Job(command))

    def wait(self, slots: Iterable[int]) -> None:
        """Until these host slots may be written."""
        wanted = set(slots)
        while any(wanted & set(job.host_slots) for job in self._jobs):
            self.do_a_job()

    def forget(self, request_id: str) -> None:
        for job in self._jobs:
            job.forgotten |= job.command.request_id == request_id
        for names in (self._failed, *self._news):
            names.discard(request_id)

    def do_a_job(self) -> None:
        """The one that was asked for first."""
        if not self._jobs:
            return
        job = self._jobs.popleft()
        request_id, source, target = job.command
        if job.forgotten or request_id in self._failed:
            return
        is_demotion = isinstance(job.command, Demote)
        give, take = (self.host, self.file) if is_demotion else (self.file, self.host)
        failed = self._rng.random() < FAILURES
        for one, other in zip(source, target, strict=True):
            take[other] = LOST if failed else give[one]
        if failed:
            self._failed.add(request_id)
            self._news[1].add(request_id)
        elif not is_demotion:
            self._news[0].add(request_id)

    def take_finished(self) -> tuple[set[str], set[str]]:
        news, self._news = self._news, (set(), set())
        return news


@dataclass
class Kept:
    """Of a swapped request in the worker: its run (see world_worker), and how far it has come."""

    run: int
    private: list[dict[int, Any]]
    num_tokens: int


class LabelCopier:
    """Executes the scheduler's commands at the times at which our worker does.

    Args:
        capacities: of each rank.
        rng: which jobs are done when, and fail.
    """

    def __init__(self, capacities: Sequence[Capacity], rng: random.Random) -> None:
        self.tiers = [Tiers(one, rng) for one in capacities]
        self.kept: dict[str, Kept] = {}
        self.loads: dict[str, Load] = {}  # of this step
        self.seen: Counter[str] = Counter()
        self._rng = rng

    def begin_step(self, commands: Sequence[Command], pages: list[list[Any]], rows: Any) -> None:
        """All but loads, before anything of the step is written."""
        self.loads = {}
        for command in commands:
            match command:
                case Save():
                    self._save(command, pages, rows[command.request_id])
                case Load():
                    assert command.request_id in self.kept
                    self.loads[command.request_id] = command
                case Forget():
                    del self.kept[command.request_id]
                    for tiers in self.tiers:
                        tiers.forget(command.request_id)
                case _:
                    assert command.request_id in self.kept
                    for tiers in self.tiers:
                        tiers.add(command)

    def resume(self, request_id: str) -> Kept | None:
        """What the run of a request that is loaded in this step had; None: it begins anew."""
        load = self.loads.get(request_id)
        if load is None:
            assert request_id not in self.kept
            return None
        kept = self.kept[request_id]
        self.seen["truncated"] += load.num_tokens < kept.num_tokens
        for entries in kept.private:
            for slot in [slot for slot in entries if slot >= load.num_tokens]:
                del entries[slot]
        return kept

    def load(self, pages: list[list[Any]]) -> None:
        """Before the forward pass; the background is at work meanwhile."""
        self._work()
        for load in self.loads.values():
            for page_ids, slots in zip(load.pages.page_ids, load.pages.slots, strict=True):
                for page, slot in zip(page_ids, slots, strict=True):
                    pages[page] = list(self._loaded(slot))
            kept = self.kept.pop(load.request_id)
            for index, slot in enumerate(load.pages.ring_slots):
                assert self._loaded(slot) == (load.request_id, index, kept.run, kept.num_tokens)

    def finished(self, is_busy: bool) -> Finished | None:
        """Some jobs are done after the step; is_busy: there was a forward pass."""
        self._work()
        reports = []
        for tiers in self.tiers:
            promoted, failed = tiers.take_finished()
            if promoted or failed:
                reports.append(Finished(dict.fromkeys(promoted, 1), failed))
                self.seen["promoted in the background"] += bool(promoted) and is_busy
        if not reports:
            return None
        total = reports[0]
        for report in reports[1:]:
            total = total.aggregate(report)
        return total

    def _save(self, save: Save, pages: list[list[Any]], row: Any) -> None:
        assert save.request_id not in self.kept
        num_tokens = 1 + max(row.private[0])
        self.kept[save.request_id] = Kept(row.run, [dict(one) for one in row.private], num_tokens)
        every = [slot for some in (*save.pages.slots, save.pages.ring_slots) for slot in some]
        for tiers in self.tiers:
            tiers.wait(every)
            for page_ids, slots in zip(save.pages.page_ids, save.pages.slots, strict=True):
                for page, slot in zip(page_ids, slots, strict=True):
                    tiers.host[slot] = list(pages[page])
            for index, slot in enumerate(save.pages.ring_slots):
                tiers.host[slot] = (save.request_id, index, row.run, num_tokens)

    def _work(self) -> None:
        """Some jobs are done."""
        for tiers in self.tiers:
            for _ in range(self._rng.choice([0, 0, 1, 3])):
                tiers.do_a_job()

    def _loaded(self, slot: int) -> Any:
        first, *others = (tiers.host[slot] for tiers in self.tiers)
        assert first is not LOST
        assert all(one == first for one in others), "ranks differ"
        return first
