"""What the rounds of a load come to: a row for each case and rate."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

from paged_kv import results
from paged_kv.bench.cases import PLAIN, Case, Load
from paged_kv.bench.client import Served
from paged_kv.bench.rows import case_fields

TIMES = ("ttft_ms", "ttft_mean_ms", "ttft_p99_ms", "itl_ms", "itl_mean_ms", "itl_p99_ms", "tpot_ms")


@dataclass
class Series:
    """What one case did at one rate, in all rounds.

    Args:
        served: one per round.
        idle_cpu: share of a core that its server took while others ran; None: it was not there.
    """

    served: list[Served] = field(default_factory=list)
    idle_cpu: float | None = None

    def median(self, value: Callable[[Served], float]) -> float:
        """Over rounds."""
        return median(value(one) for one in self.served)

    def ratios(self, plain: Series, value: Callable[[Served], float]) -> list[float]:
        """A value over plain vLLM's, round by round; none if that is 0 (see itl_ms)."""
        pairs = [(value(a), value(b)) for a, b in zip(self.served, plain.served, strict=True)]
        return [one / other for one, other in pairs] if all(other for _, other in pairs) else []


@dataclass(frozen=True)
class Score:
    """What a command's rows are scored by.

    Args:
        task: the command's name.
        metric: the score's name.
        higher_is_better: which way it goes.
        value: the score of a run.
        columns: of the table, after those that name the case.
    """

    task: str
    metric: str
    higher_is_better: bool
    value: Callable[[Served], float]
    columns: tuple[str, ...]


Turns = dict[tuple[float, Case], Series]  # by request rate and case


def fields_of(args: argparse.Namespace, load: Load, rate: float, case: Case) -> results.Row:
    """What a row says of its case, known before it has run."""
    return {
        **case_fields(args, case, load),
        "request_rate": "inf" if math.isinf(rate) else rate,
    }


def make_rows(
    args: argparse.Namespace, score: Score, load: Load, turns: Turns
) -> Iterator[results.Row]:
    """The result row of each case and rate, in the order of the turns."""
    value = score.value
    for (rate, case), series in turns.items():
        plain = next((s for (r, c), s in turns.items() if r == rate and c.policy == PLAIN), None)
        all_times = [served.times for served in series.served]
        ratios = [] if plain is None else series.ratios(plain, value)
        yield {
            "task": score.task,
            **fields_of(args, load, rate, case),
            "engine": "vllm serve",
            "score": round(series.median(value), 3),
            "metric": score.metric,
            "higher_is_better": score.higher_is_better,
            "standard_error": results.standard_error([value(served) for served in series.served]),
            "samples": len(series.served),
            "seconds": round(sum(served.seconds for served in series.served), 2),
            **results.provenance(args.model),
            "tokens_per_second": round(series.median(lambda one: one.tokens_per_second), 2),
            **{name: round(median(times[name] for times in all_times), 2) for name in TIMES},
            "running": max(served.running for served in series.served),
            "preemptions": series.median(lambda one: one.preemptions),
            "prompt_tokens": series.median(lambda one: one.prompt_tokens),
            "ratio": round(median(ratios), 4) if ratios else None,
            "ratios": [round(ratio, 4) for ratio in ratios],
            "idle_cpu": None if series.idle_cpu is None else round(series.idle_cpu, 4),
        }
