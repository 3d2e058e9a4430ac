"""What remains of the full cache's score, by policy and budget: the top of the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

from paged_kv.report import rows as reading
from paged_kv.report.rows import Group
from paged_kv.results import Row

Key = tuple[str, Any]  # label of a curve, budget


class Cell(NamedTuple):
    """A curve at a budget: means over tasks, each of which is a mean over its settings."""

    share: float  # of the full cache's score
    memory: float | None  # of the full cache's bytes per token
    by_task: dict[str, float]
    num_compared: int  # tasks with their settings and metrics that it ran


class Summary(NamedTuple):
    """Of one place."""

    place: str
    tasks: list[str]  # that the means are over
    num_compared: int  # these with their settings and metrics
    left_out: list[str]  # groups without a full cache to compare with
    budgets: list[Any]
    cells: dict[str, dict[Any, Cell]]  # label -> budget -> cell; None is a budget, too


def summaries(groups: Iterable[Group]) -> list[Summary]:
    """One for each place that has quality rows."""
    places: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.task not in reading.SPEED:
            places[group.place].append(group)
    return [_summary(place, members) for place, members in places.items()]


def baseline(row: Row, group: Group) -> Row | None:
    """The full cache that the row is compared with: of the same engine if it ran there."""
    found = [other for other in group.rows if reading.is_full(other)]
    same = [other for other in found if other["engine"] == row["engine"]]
    return next(iter(same or found), None)


def remaining(row: Row, full: Row) -> float | None:
    """The share of the full cache's score; of a score that should be low, its inverse."""
    score, best = reading.number(row["score"]), reading.number(full["score"])
    if not row["higher_is_better"]:
        score, best = best, score
    if score is None or best is None or best <= 0 or score < 0:
        return None
    if not row["higher_is_better"] and score == 0:
        return None  # a divergence from the full cache, which itself has none: no share
    return score / best


def _summary(place: str, groups: list[Group]) -> Summary:
    shares: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    memory: dict[Key, list[float]] = defaultdict(list)
    compared_in: dict[Key, set[str]] = defaultdict(set)
    left_out = []
    whole_tasks = {group.task for group in groups if not group.subtask}
    for group in groups:
        if group.subtask and group.task in whole_tasks:
            continue  # its mean over subtasks is there
        compared = False
        for row in group.rows:
            full = baseline(row, group)
            if full is None or (share := remaining(row, full)) is None:
                continue
            compared = True
            if reading.is_full(row):
                continue
            key = (row["label"], row["budget"])
            shares[key][group.task].append(share)
            compared_in[key].add(group.name)
            size, whole = (reading.number(each["bytes_per_token"]) for each in (row, full))
            if size and whole:
                memory[key].append(size / whole)
        if not compared:
            left_out.append(group.name)
    cells: dict[str, dict[Any, Cell]] = defaultdict(dict)
    for (label, budget), tasks in sorted(shares.items(), key=_order):
        means = {task: fmean(found) for task, found in tasks.items()}
        size = fmean(memory[label, budget]) if memory[label, budget] else None
        num_compared = len(compared_in[label, budget])
        cells[label][budget] = Cell(fmean(means.values()), size, means, num_compared)
    all_tasks = {task for found in shares.values() for task in found}
    budgets = sorted({budget for _, budget in shares}, key=reading.budget_order)
    names = sorted(all_tasks, key=reading.task_order)
    num_compared = len(set().union(*compared_in.values()))
    return Summary(place, names, num_compared, left_out, budgets, dict(cells))


def _order(item: tuple[Key, Any]) -> tuple[bool, str, tuple[int, float]]:
    label, budget = item[0]
    return budget is not None, label.lower(), reading.budget_order(budget)
