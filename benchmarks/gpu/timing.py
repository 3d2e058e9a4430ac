"""Times of calls on a GPU, by events; on a CPU by the clock, for trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
CACHES = 4  # what rotating inputs take together, in second-level caches
CPU_CACHE = 1 << 16  # taken for a CPU's: a trial is small


class Times(NamedTuple):
    """Milliseconds of a call, medians over rounds.

    Args:
        ms: in a CUDA graph of all calls, one after another, by their number: the launches' cost on
            the host is not in it.
        eager_ms: launched from Python, between two events of its own.
        graph_error: why there is no graph; ms is then eager_ms.
    """

    ms: float
    eager_ms: float
    graph_error: str | None = None

    def fields(self) -> dict[str, Any]:
        """Of a line."""
        found = {"ms": round(self.ms, 5), "eager_ms": round(self.eager_ms, 5)}
        return found | ({"graph_error": self.graph_error} if self.graph_error else {})


def num_sets(num_bytes: int, device: str) -> int:
    """How many sets of inputs of so many bytes no call finds in the cache, used in turn."""
    cache = CPU_CACHE
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-CACHES * cache // max(1, num_bytes)))


def measure(calls: Sequence[Call], device: str, rounds: int) -> Times:
    """Each call has inputs of its own; they take turns. They are warmed up here."""
    for _ in range(2):
        for call in calls:
            call()
    if device == "cpu":
        ms = median(_clock(call) for _ in range(rounds) for call in calls)
        return Times(ms, ms)
    torch.cuda.synchronize()
    eager = median(_between_events(call) for _ in range(rounds) for call in calls)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Times(eager, eager, str(error).splitlines()[0][:300])
    graph.replay()
    whole = median(_between_events(graph.replay) for _ in range(rounds))
    return Times(whole / len(calls), eager)


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _between_events(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth(num_bytes: int, device: str, rounds: int) -> tuple[Times, float]:
    """Of a copy within the device's memory: (times, GB/s, bytes read and written)."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure([lambda: target.copy_(source)], device, rounds)
    assert torch.equal(source, target)
    return times, 2 * num_bytes / times.ms / 1e6
