"""The swap's counters, in vLLM's log and in its Prometheus metrics (vllm:paged_kv_swap_...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

PREFIX = "vllm:paged_kv_swap"
COUNTERS = {
    "swapped_out_requests": "Preempted requests whose pages were saved.",
    "swapped_out_pages": "Pages of layer groups that were saved.",
    "swapped_out_bytes": "Bytes of the slots that they were saved to, on all ranks.",
    "swapped_in_requests": "Requests that went on from their saved pages.",
    "swapped_in_pages": "Pages of layer groups that were restored.",
    "restored_tokens": "Tokens that were restored instead of being computed again.",
    "demoted_requests": "Saved requests that were moved from memory to the file.",
    "promoted_requests": "Saved requests that were asked back from the file.",
}
# Why a preempted request is computed again: fallback_REASON in the counts, a label in Prometheus.
FALLBACK = "fallback_"
REASONS = ("full", "io_error", "stale", "reset")
TIERS = ("host", "file")


@dataclass
class SwapStats(KVConnectorStats):
    """data: {"counts": {name: since the last time}, "used": {tier: slots}}; plain, for msgpack."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.data: dict[str, Any] = {"counts": {}, "used": {}}

    def add(self, name: str, number: int) -> None:
        """Counts."""
        counts = self.data["counts"]
        counts[name] = counts.get(name, 0) + number

    def aggregate(self, other: KVConnectorStats) -> SwapStats:
        """other happened later."""
        assert isinstance(other, SwapStats)
        for name, number in other.data["counts"].items():
            self.add(name, number)
        self.data["used"].update(other.data["used"])
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log: everything since its last line."""
        used = {f"{tier}_slots_used": number for tier, number in self.data["used"].items()}
        return {**self.data["counts"], **used}

    def is_empty(self) -> bool:
        """Whether nothing has changed."""
        return not self.data["counts"] and not self.data["used"]


class Meter:
    """Turns totals into what is new since they were read last."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._used = (0, 0)

    def read(self, counts: Mapping[str, int], used: tuple[int, int]) -> SwapStats:
        """What has changed; empty if nothing has.

        Args:
            counts: totals by name.
            used: host slots and file slots that are taken.
        """
        stats = SwapStats()
        for name, total in counts.items():
            if total != self._counts.get(name, 0):
                stats.add(name, total - self._counts.get(name, 0))
        if used != self._used:
            stats.data["used"] = dict(zip(TIERS, used, strict=True))
        self._counts, self._used = dict(counts), used
        return stats


class SwapPromMetrics(KVConnectorPromMetrics):
    """The same in Prometheus, with the labels model_name and engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"{PREFIX}_{name.removeprefix('swapped_')}",
                    documentation=text,
                    labelnames=labelnames,
                ),
                per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }
        fallbacks = self._counter_cls(
            name=f"{PREFIX}_fallbacks",
            documentation="Preempted requests that were computed again, by reason.",
            labelnames=[*labelnames, "reason"],
        )
        for reason in REASONS:
            self._counters[f"{FALLBACK}{reason}"] = create_metric_per_engine(
                fallbacks,
                {index: [*values, reason] for index, values in per_engine_labelvalues.items()},
            )
        self._used = {
            tier: create_metric_per_engine(
                self._gauge_cls(
                    name=f"{PREFIX}_{tier}_slots_used",
                    documentation=f"Slots of the {tier} tier that hold pages.",
                    multiprocess_mode="mostrecent",
                    labelnames=labelnames,
                ),
                per_engine_labelvalues,
            )
            for tier in TIERS
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """A SwapStats' data, after each step that has some."""
        for name, number in transfer_stats_data["counts"].items():
            self._counters[name][engine_idx].inc(number)
        for tier, number in transfer_stats_data["used"].items():
            self._used[tier][engine_idx].set(number)
