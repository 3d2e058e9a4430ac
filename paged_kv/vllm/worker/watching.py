"""What a worker counts for whoever watches the server: compactions, their time, what is spilled."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paged_kv.vllm.watch import metrics, totals
from paged_kv.vllm.watch.totals import Series
from paged_kv.vllm.worker.spilling import RequestStores


class WorkerWatch:
    """Counters of one rank; nothing waits for a GPU.

    Args:
        engine: vLLM's number of the engine.
        rank: of the worker.
        device: that compacts.
        spilled: what requests have spilled, if the policy spills.
    """

    def __init__(
        self, engine: int, rank: int, device: torch.device, spilled: RequestStores | None
    ) -> None:
        labels = {"rank": str(rank)}
        series = [Series("compactions", labels), Series("compaction_seconds", labels)]
        if spilled is not None:
            series.append(Series("fetched_entries", labels))
            series += [Series("bytes", {"tier": t, "use": "spill"}) for t in ("host", "file")]
        self._file = totals.for_engine(engine, rank, series, {})
        self._clock = _HostClock() if device.type == "cpu" else _DeviceClock(device)
        self._spilled = spilled
        self._next = 0.0

    @contextmanager
    def compactions(self, number: int) -> Iterator[None]:
        """Around so many compactions, in each step: counts them, and their time."""
        if self._file is None:
            yield
            return
        values = self._file.values
        if number:
            values[0] += number
            with self._clock:
                yield
        else:
            yield
        values[1] += self._clock.take()
        if self._spilled is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + metrics.INTERVAL
            sizes = self._spilled.known_bytes
            values[2:] = self._spilled.num_fetched, sizes["host"], sizes["mmap"]


class _HostClock:
    """Time of what the host itself does."""

    def __init__(self) -> None:
        self._nanoseconds = self._begin = 0

    def __enter__(self) -> None:
        self._begin = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._nanoseconds += time.perf_counter_ns() - self._begin

    def take(self) -> int:
        """Nanoseconds that have passed inside since they were taken last."""
        taken, self._nanoseconds = self._nanoseconds, 0
        return taken


class _DeviceClock:
    """The time that a GPU takes, told once it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: deque[tuple[torch.Event, torch.Event]] = deque()  # the oldest first

    def __enter__(self) -> None:
        self._spans.append((self._event(), self._event()))
        self._spans[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self._spans[-1][1].record()

    def take(self) -> int:
        """Nanoseconds of what is done and has not been told; waits for nothing."""
        milliseconds = 0.0
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            milliseconds += begin.elapsed_time(end)
        return int(milliseconds * 1e6)

    def _event(self) -> torch.Event:
        return torch.Event(self._device, enable_timing=True)
