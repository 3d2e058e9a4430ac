"""What a scheduler counts for whoever watches the server; written after each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from paged_kv.config import CompressionConfig
from paged_kv.registry import FULL
from paged_kv.vllm.scheduler.manager import PagedManager
from paged_kv.vllm.scheduler.page_map import PageMap, has_dropped, num_held
from paged_kv.vllm.swap.connector import SwapConnector
from paged_kv.vllm.watch import metrics, totals
from paged_kv.vllm.watch.totals import Series


class SchedulerWatch:
    """Counters and gauges of one engine.

    Args:
        scheduler: one of ours.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._pool = self._managers[0].block_pool
        config = scheduler.kv_cache_config
        self._num_layers = [len(group.layer_names) for group in config.kv_cache_groups]
        self._page_bytes = sum(t.size for t in config.kv_cache_tensors) // config.num_blocks
        additional = scheduler.vllm_config.additional_config
        self._config = CompressionConfig.from_dict(additional["paged_kv"])
        policy = self._config.create_policy()
        self._dropped = "merged_entries" if policy.merges else "evicted_entries"
        engine = scheduler.vllm_config.parallel_config.data_parallel_index
        self._file = totals.for_engine(engine, None, self._series(), self._facts())
        self._map = None
        if self._file is not None:
            self._map = PageMap(scheduler, self._file.path, policy.recent_window)
        self._next = 0.0

    def update(self) -> None:
        """After a step."""
        if self._file is None or self._map is None:
            return
        counters = [number for numbers in self._dropped_by_group() for number in numbers]
        counters += self._under_pressure()
        self._file.values[: len(counters)] = counters
        now = time.monotonic()
        if now >= self._next or not self._scheduler.running:
            self._next = now + metrics.INTERVAL
            self._file.values[len(counters) :] = self._gauges()
        self._map.update()

    def _series(self) -> list[Series]:
        """As update writes them."""
        series = []
        for manager in self._paged():
            group = {"group": str(manager.kv_cache_group_id)}
            series.append(Series("freed_pages", group))
            series.append(Series(self._dropped, {**group, "policy": self._config.policy}))
        if self._scheduler.pressure is not None:
            series += [Series("shrunk_requests", {}), Series("avoided_preemptions", {})]
        series += [Series("pool_pages", {}), Series("free_pages", {})]
        series += [Series("held_pages", {"group": str(i)}) for i in range(len(self._managers))]
        series.append(Series("requests_at_budget", {}))
        series.append(Series("bytes", {"tier": "device", "use": "pages"}))
        if self._config.swap_space:
            series += [Series("bytes", {"tier": t, "use": "swap"}) for t in ("host", "file")]
        return series

    def _facts(self) -> dict[str, Any]:
        """The layer groups, with their budgets after max_model_len, and what fits."""
        length = self._scheduler.max_model_len
        groups = [
            {
                "policy": self._config.policy if isinstance(manager, PagedManager) else FULL,
                "layers": layers,
                "budget": manager.schedule.budget(length)
                if isinstance(manager, PagedManager)
                else None,
            }
            for manager, layers in zip(self._managers, self._num_layers, strict=True)
        ]
        capacity, layers = self._scheduler.capacity, self._num_layers
        num_layers = [layers[manager.kv_cache_group_id] for manager in self._paged()]
        return {
            "groups": groups,
            "page_size": self._paged()[0].block_size,
            "pool_pages": capacity.num_pages - 1,
            "sequence_pages": capacity.pages_per_sequence(),
            "plain_sequence_pages": capacity.plain_pages(num_layers),
            "longest_prompt": capacity.longest_prompt,
        }

    def _paged(self) -> Sequence[PagedManager]:
        managers: Sequence[PagedManager] = self._scheduler.paged_managers
        return managers

    def _dropped_by_group(self) -> list[tuple[int, int]]:
        """(pages, entries) that compactions have emptied."""
        return [
            (
                manager.num_freed,
                manager.num_freed
                * manager.block_size
                * self._num_layers[manager.kv_cache_group_id],
            )
            for manager in self._paged()
        ]

    def _under_pressure(self) -> list[int]:
        if self._scheduler.pressure is None:
            return []
        counts = self._scheduler.pressure.counts
        return [counts["shrunk_requests"], counts["avoided_preemptions"]]

    def _gauges(self) -> list[int]:
        pages = self._pool.num_gpu_blocks - 1  # without vLLM's null page
        free = self._pool.get_num_free_blocks()
        held = [sum(map(num_held, m.req_to_blocks.values())) for m in self._managers]
        at_budget = sum(has_dropped(self._paged(), request) for request in self._scheduler.running)
        used = (pages - free) * self._page_bytes
        return [pages, free, *held, at_budget, used, *self._swapped()]

    def _swapped(self) -> list[int]:
        if not self._config.swap_space:
            return []
        connector = self._scheduler.connector
        ledger = connector.ledger if isinstance(connector, SwapConnector) else None
        if ledger is None:
            return [0, 0]
        slot = ledger.capacity.slot_bytes * ledger.num_ranks
        return [slots * slot for slots in ledger.used]
