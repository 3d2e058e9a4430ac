"""Interleaved comparison of engines: A B A B, medians, ratios of rounds that ran side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from paged_kv.bench.process import EngineProcess
from paged_kv.vllm.driver.workload import EngineSettings, RunResult, Tokens, Workload

Engines = Mapping[str, EngineProcess]


@dataclass
class Series:
    """What one engine did in all rounds.

    Args:
        results: one per round.
        idle_cpu: share of one core that the engine used while the others ran.
    """

    results: list[RunResult] = field(default_factory=list)
    idle_cpu: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Median over rounds."""
        return statistics.median(result.tokens_per_second for result in self.results)

    @property
    def cpu_seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(result.cpu_seconds for result in self.results)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        queries = sum(result.prefix_queries for result in self.results)
        return sum(result.prefix_hits for result in self.results) / max(1, queries)

    def ratios(self, baseline: Series) -> list[float]:
        """Tokens per second over those of the baseline, round by round."""
        pairs = zip(self.results, baseline.results, strict=True)
        return [result.tokens_per_second / other.tokens_per_second for result, other in pairs]

    def compared(self, baseline: Series) -> dict[str, Any]:
        """The fields that every comparison reports."""
        ratios = self.ratios(baseline)
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "baseline_tokens_per_second": round(baseline.tokens_per_second, 1),
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "cpu_ratio": round(baseline.cpu_seconds / self.cpu_seconds, 4),
            "idle_cpu": round(max(self.idle_cpu, baseline.idle_cpu), 4),
        }

    def pressure(self, prefix: str = "") -> dict[str, Any]:
        """How the sequences shared the pool, in the last round."""
        last = self.results[-1]
        return {
            f"{prefix}peak_running": last.peak_running,
            f"{prefix}peak_pages": last.peak_pages,
            f"{prefix}preemptions": last.preemptions,
        }


@contextmanager
def running(settings: Mapping[str, EngineSettings], warm_up: Workload) -> Iterator[Engines]:
    """Starts an engine for each name and lets each do its first, slow steps."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(EngineProcess(settings[name])) for name in settings}
        for engine in engines.values():
            engine.ready()
        for engine in engines.values():
            engine.run(warm_up)
        yield engines


def interleave(engines: Engines, rounds: Sequence[Sequence[Workload]]) -> dict[str, Series]:
    """Every engine runs round 0 in turn, then every engine runs round 1, ...

    A round of several workloads counts as one run.
    """
    series = {name: Series() for name in engines}
    cpu_before = {name: engine.cpu_seconds() for name, engine in engines.items()}
    cpu_busy = dict.fromkeys(engines, 0.0)
    seconds_busy = dict.fromkeys(engines, 0.0)
    total = sum(workload.output_tokens for round_ in rounds for workload in round_) * len(engines)
    with tqdm(total=total, unit="tok", mininterval=1.0) as bar:
        for round_ in rounds:
            for name, engine in engines.items():
                bar.set_description(name)
                cpu, start = engine.cpu_seconds(), time.perf_counter()
                parts = [engine.run(workload, advance(bar)) for workload in round_]
                series[name].results.append(_joined(parts))
                cpu_busy[name] += engine.cpu_seconds() - cpu
                seconds_busy[name] += time.perf_counter() - start
    for name, engine in engines.items():
        idle = sum(seconds for other, seconds in seconds_busy.items() if other != name)
        cpu_idle = engine.cpu_seconds() - cpu_before[name] - cpu_busy[name]
        series[name].idle_cpu = cpu_idle / idle if idle else 0.0
    return series


def advance(bar: Any) -> Callable[[int], None]:
    """Moves bar on by a run's output tokens, of which it is told how many there are so far."""
    start = bar.n

    def progress(tokens: int) -> None:
        bar.update(start + tokens - bar.n)

    return progress


def _joined(parts: Sequence[RunResult]) -> RunResult:
    return RunResult(
        sum(part.seconds for part in parts),
        sum(part.cpu_seconds for part in parts),
        [output for part in parts for output in part.outputs],
        [step for part in parts for step in part.steps],
        sum(part.prefix_queries for part in parts),
        sum(part.prefix_hits for part in parts),
        None if parts[0].shrunk is None else sum(part.shrunk or 0 for part in parts),
    )


def equal_prefix(tokens: Tokens, other: Tokens) -> int:
    """Tokens up to the first difference."""
    for index, (a, b) in enumerate(zip(tokens, other, strict=False)):
        if a != b:
            return index
    return min(len(tokens), len(other))
