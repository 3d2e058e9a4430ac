"""From outcomes to result rows: means over samples, their errors; and how rows are printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean
from typing import Protocol

from paged_kv import results
from paged_kv.bench.rows import of_all
from paged_kv.eval.cases import TRUNCATE, Case
from paged_kv.eval.peers import peers


class Measured(Protocol):
    """What every outcome has."""

    @property
    def kept(self) -> float: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def result_row(
    args: argparse.Namespace,
    task: str,
    case: Case,
    metric: str,
    values: Sequence[float],
    outcomes: Sequence[Measured],
    num_seen: Sequence[int],
    higher_is_better: bool = True,
) -> results.Row:
    """The fields that the rows of all tasks have; see paged_kv.results.

    Args:
        args: of a command with the common options.
        task: its name.
        case: what was run.
        metric: what the values are.
        values: of each sample.
        outcomes: of each sample.
        num_seen: of each sample, tokens that were processed when entries and bytes were counted.
        higher_is_better: which way the values go.
    """
    budget = case.budget
    shares = [outcome.cache_bytes / seen for outcome, seen in zip(outcomes, num_seen, strict=True)]
    row = {
        "task": task,
        "policy": case.policy,
        "budget": float(budget) if isinstance(budget, Fraction) else budget,
        "page_format": case.config.page_format,
        "engine": args.engine,
        "score": round(fmean(values), 6),
        "metric": metric,
        "higher_is_better": higher_is_better,
        "standard_error": results.standard_error(values),
        "samples": len(values),
        "kept": round(fmean(outcome.kept for outcome in outcomes), 2),
        "bytes_per_token": round(fmean(shares), 2),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 2),
        **of_all(args),
    }
    if case.is_peer:
        versions = peers.check(case.policy, args.kvpress_python)
        return row | {"engine": peers.engine(case.policy), "versions": versions}
    return row | {"kept_by_layer": held_by_layer(case, max(num_seen))}


def held_by_layer(case: Case, num_tokens: int) -> list[int]:
    """Entries of each layer, of the longest sample."""
    if case.policy == TRUNCATE:
        assert isinstance(case.budget, int)
        num_tokens = min(num_tokens, case.budget)
    return case.held(num_tokens).by_layer
