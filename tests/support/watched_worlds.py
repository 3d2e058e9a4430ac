"""Worlds whose scheduler is watched: after each step its file says what the pool and managers do.

What is expected comes from the pages alone: those that become null pages were given back.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from world_rules import Rules
from worlds import World

from paged_kv.core.schedule import NEVER
from paged_kv.vllm.watch import totals


class WatchedWorld(World):
    """A World with a file in `directory`."""

    def __init__(self, rules: Rules, directory: Path, **kwargs: Any) -> None:
        super().__init__(rules, **kwargs)
        assert self.scheduler._watch is not None
        self.file = totals.read(directory / "engine-0")
        self.freed: Counter[int] = Counter()  # pages by group
        self.num_checks = 0
        for manager in self.paged_managers:
            self._count_freed(manager)

    def process(self) -> None:
        """And checks: the output's loggers have been told."""
        told = bool(self._in_flight)
        super().process()
        if told:
            self._check_file()
            self.num_checks += 1

    def _count_freed(self, manager: Any) -> None:
        remove = manager._remove_blocks_in_range

        def counting(request_id: str, *args: Any) -> None:
            held = self._num_held(manager, request_id)
            remove(request_id, *args)
            self.freed[manager.kv_cache_group_id] += held - self._num_held(manager, request_id)

        manager._remove_blocks_in_range = counting

    def _num_held(self, manager: Any, name: str) -> int:
        return sum(not block.is_null for block in manager.req_to_blocks[name])

    def _check_file(self) -> None:
        values = {
            (series.name, *series.labels.values()): value
            for series, value in zip(self.file.series, self.file.values.tolist(), strict=True)
        }
        assert values["pool_pages",] == self.rules.num_pages - 1
        assert values["free_pages",] == self.num_free
        for group, manager in enumerate(self._managers):
            held = sum(len(self.held(name)[group]) for name in manager.req_to_blocks)
            assert values["held_pages", str(group)] == held
        for manager in self.paged_managers:
            group = str(manager.kv_cache_group_id)
            freed = self.freed[manager.kv_cache_group_id]
            assert values["freed_pages", group] == freed
            assert values["evicted_entries", group, "streaming"] == freed * self.rules.page_size
        assert values["requests_at_budget",] == sum(
            any(
                schedule.evicted(request.num_computed_tokens, self.start(request.request_id))
                for schedule in filter(None, self.rules.schedules)
            )
            for request in self.scheduler.running
            if self.start(request.request_id) != NEVER
        )
        if self.rules.pressure:
            counts = self.scheduler.pressure.counts
            for name in ("shrunk_requests", "avoided_preemptions"):
                assert values[name,] == counts[name]
        if self.ledger is not None:
            slot = self.ledger.capacity.slot_bytes * self.ledger.num_ranks
            used = [slots * slot for slots in self.ledger.used]
            assert [values["bytes", tier, "swap"] for tier in ("host", "file")] == used
