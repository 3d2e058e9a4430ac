"""What `paged-kv eval perplexity` prints: means over windows, their errors, differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any, NamedTuple

from paged_kv.eval.task import Case, Outcome, Task


class Row(NamedTuple):
    """One line of the result; see paged_kv.eval.perplexity."""

    policy: str
    budget: int | float | None  # None for the policy that ignores it
    page_format: str
    protocol: str
    nll: float
    nll_se: float | None  # standard errors: None of one window
    ppl: float
    kl: float | None  # None if the engine does not know
    kl_se: float | None
    vs_first: float
    vs_first_se: float | None
    kept: float
    bytes_per_token: float
    seconds: float
    windows: list[dict[str, Any]]  # offset, nll, kl of each; in JSON only


COLUMNS = Row._fields[:-1]


def make_row(
    windows: Sequence[Task], case: Case, outcomes: Sequence[Outcome], first: Sequence[Outcome]
) -> Row:
    """The line of a case.

    Args:
        windows: what was predicted.
        case: from what.
        outcomes: one for each window.
        first: the same of the case that this one is compared with.
    """
    nll = [outcome.nll for outcome in outcomes]
    kl = [outcome.kl for outcome in outcomes if outcome.kl is not None]
    differences = [one.nll - other.nll for one, other in zip(outcomes, first, strict=True)]
    num_bytes = fmean(outcome.cache_bytes for outcome in outcomes)
    return Row(
        policy=case.policy,
        budget=float(case.budget) if isinstance(case.budget, Fraction) else case.budget,
        page_format=case.config.page_format,
        protocol=windows[0].protocol,
        nll=round(fmean(nll), 6),
        nll_se=standard_error(nll),
        ppl=round(math.exp(fmean(nll)), 4),
        kl=round(fmean(kl), 6) if kl else None,
        kl_se=standard_error(kl),
        vs_first=round(fmean(differences), 6),
        vs_first_se=standard_error(differences),
        kept=round(fmean(outcome.kept for outcome in outcomes), 2),
        bytes_per_token=round(num_bytes / windows[0].num_seen, 2),
        seconds=round(sum(outcome.seconds for outcome in outcomes), 2),
        windows=[_window(*pair) for pair in zip(windows, outcomes, strict=True)],
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, rounded; None of fewer than two."""
    if len(values) < 2:
        return None
    return round(stdev(values) / math.sqrt(len(values)), 6)


def print_table(rows: Sequence[Row]) -> None:
    """Names to the left, numbers to the right, nothing where a number is not known."""
    shown = [["" if cell is None else str(cell) for cell in row[: len(COLUMNS)]] for row in rows]
    lines = [list(COLUMNS), *shown]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{line[0]:{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells))


def _window(task: Task, outcome: Outcome) -> dict[str, Any]:
    kl = None if outcome.kl is None else round(outcome.kl, 6)
    return {"offset": task.offset, "nll": round(outcome.nll, 6), "kl": kl}
