"""What is found and answered: needle, RULER, LongBench."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from document_tables.lines import Row, grid, head, line, percent, rows_of, single

NEAREST = ("streaming", "h2o")  # which others are compared with
# RULER's needles, or their table is too wide.
SHORT = {"single_": "s", "multikey_": "k", "multivalue": "values", "multiquery": "queries"}


def needle(rows: Sequence[Row], question: str) -> list[str]:
    """Keys found, in percent; most with the largest budget first."""
    found = [row for row in rows_of("needle", rows, question=question) if row["budget"]]
    return grid(found, lambda rows: f"{100 * single(rows)['score']:.0f}", -1, highest_first=True)


def means(rows: Sequence[Row], task: str, order: int) -> list[str]:
    """Mean over all subtasks in percent, by policy and budget; the best of column `order` first."""
    found = [row for row in rows_of(task, rows) if row["budget"]]
    return grid(found, lambda several: percent(single(several)), order, highest_first=True)


def subtasks(rows: Sequence[Row], task: str, budget: int) -> list[str]:
    """Each subtask in percent at one budget, with the full cache; by the mean, highest first."""
    names = [row["task"] for row in rows if row["task"].startswith(f"{task}:")]
    names = list(dict.fromkeys(names))
    shown = [row for row in rows if row["task"] in (task, *names)]
    shown = [row for row in shown if row["budget"] in (budget, None)]
    scores = {(row["policy"], row["task"]): f"{100 * row['score']:.0f}" for row in shown}
    order = sorted(rows_of(task, shown), key=lambda row: (row["budget"] is not None, -row["score"]))
    lines = head("policy", "mean", *map(_short, names))
    for row in order:
        single([other for other in order if other["policy"] == row["policy"]])
        cells = [scores[row["policy"], name] for name in (task, *names)]
        lines.append(line([f"`{row['policy']}`", *cells]))
    return lines


def beside(rows: Sequence[Row], task: str, budget: int) -> list[str]:
    """How far each policy is above those of NEAREST, in points, over the same examples."""
    rows_of(task, rows)
    each = _scores(rows, task, budget)
    lines = []
    for policy, scores in each.items():
        cells = [f"`{policy}`", f"{100 * fmean(scores.values()):.1f}"]
        for other in NEAREST:
            known = each[other]
            differences = [100 * (scores[name] - known[name]) for name in scores]
            error = stdev(differences) / math.sqrt(len(differences))
            same = policy == other
            cells.append("" if same else f"{fmean(differences):+.1f} ± {error:.1f}")
        wins = [str(_wins(scores, each[other])) if policy != other else "" for other in NEAREST]
        lines.append((fmean(scores.values()), line([*cells, *wins])))
    names = [f"above `{other}`" for other in NEAREST]
    names += [f"tasks above `{other}`" for other in NEAREST]
    return head("policy", "mean", *names) + [text for _, text in sorted(lines, reverse=True)]


def _short(name: str) -> str:
    name = name.partition(":")[2].removeprefix("niah_")
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def _scores(rows: Sequence[Row], task: str, budget: int) -> dict[str, dict[tuple[str, str], float]]:
    """By policy, then by subtask and example."""
    each: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["task"].startswith(f"{task}:") and row["budget"] == budget:
            scores = each.setdefault(row["policy"], {})
            scores |= {(row["task"], one["id"]): one["score"] for one in row["examples"]}
    return each


def _wins(scores: dict[tuple[str, str], float], other: dict[tuple[str, str], float]) -> int:
    """Subtasks in which one mean is above the other."""
    subtasks = {name for name, _ in scores}
    return sum(
        fmean(value for key, value in scores.items() if key[0] == subtask)
        > fmean(value for key, value in other.items() if key[0] == subtask)
        for subtask in subtasks
    )
