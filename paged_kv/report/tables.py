"""The tables of the page: cells with what they show and what they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from paged_kv.report import rows as reading
from paged_kv.report.rows import Group, number
from paged_kv.report.summary import Summary
from paged_kv.results import FIELDS, OF_ALL, PROVENANCE, Row

FIRST = ("policy", "budget", "page_format", "engine")
LAST = ("kept", "bytes_per_token", "seconds", "samples")
HEADINGS = {"page_format": "format", "bytes_per_token": "bytes/token", "place": "model"}
OWN = ("place", "label")  # not of the result rows, but of reading.named


class Cell(NamedTuple):
    """Text, and what it is sorted by: a number, or None for its text."""

    text: str
    value: float | None = None
    share: float | None = None  # of 1: how far a bar behind the text reaches
    best: bool = False


class Table(NamedTuple):
    """Headings with (text, whether numbers stand below), and rows of as many cells.

    The note says what is the same in all rows and has no column.
    """

    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[Cell]]
    note: str = ""


def of_tasks(groups: Sequence[Group]) -> list[Table]:
    """A table for each task, of all its rows."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    return [
        _task_table(task, [row for group in groups if group.task == task for row in group.rows])
        for task in sorted(tasks, key=reading.task_order)
    ]


def _task_table(task: str, rows: list[Row]) -> Table:
    rows = sorted(
        rows, key=lambda row: (str(row["policy"]).lower(), reading.budget_order(row["budget"]))
    )
    more = _more(rows)
    settings = {name for row in rows for name in reading.settings(row)}
    asked = [name for name in more if name in {*reading.SERIES, *settings}]
    measured = [name for name in more if name not in asked]
    asked = ["place", *asked]
    same = [name for name in asked if len({repr(row.get(name)) for row in rows}) == 1]
    varied = [name for name in asked if name not in same]
    names = [*FIRST, *varied, "score", "metric", *LAST, *measured]
    columns = [(_heading(name), _is_numeric(name, rows)) for name in names]
    note = ", ".join(f"{_heading(name)} {_cell(name, rows[0]).text}" for name in same)
    return Table(task, columns, [[_cell(name, row) for name in names] for row in rows], note)


def _heading(name: str) -> str:
    return HEADINGS.get(name, name.replace("_", " "))


def _more(rows: Iterable[Row]) -> list[str]:
    """The fields that the task added and a cell can show, in their order.

    A name may stand in some rows only.
    """
    given = dict.fromkeys(
        name for row in rows for name, value in row.items() if _scalar(value) or name in OF_ALL
    )
    known = {*FIELDS, *PROVENANCE, *OWN}
    return [name for name in given if name not in known]


def _scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _is_numeric(name: str, rows: Sequence[Row]) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(number(value) is not None for value in values)


def _cell(name: str, row: Row) -> Cell:
    value = row.get(name)
    if name == "budget":
        return Cell(reading.budget_text(value) or "all", number(value))
    if value is None:
        return Cell("–")
    if name == "score":
        error = number(row["standard_error"])
        return Cell(_with_error(value, error) if error else _score(value), number(value))
    if isinstance(value, dict):
        return Cell(reading.options_text(value))
    return Cell(_figure(value), number(value)) if _scalar(value) else Cell(str(value))


def _score(value: float) -> str:
    """With as many digits as others below it: 0.5000."""
    return _figure(value) if abs(value) >= 1000 else f"{value:#.4g}"


def _with_error(value: float, error: float) -> str:
    """2.320 ± 0.020: two digits of the standard error, and the value as exact."""
    decimals = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def _figure(value: Any) -> str:
    """A number as people read it: 1,024; 0.9731; 1,238.6."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def of_summary(summary: Summary) -> Table:
    """Policies by budgets: the mean share of the full cache's score, and of its memory."""
    columns = [("policy", False)]
    columns += [(reading.budget_text(budget) or "all", True) for budget in summary.budgets]
    best = {budget: _best(summary, budget) for budget in summary.budgets if budget is not None}
    rows = []
    for label, cells in summary.cells.items():
        row = [Cell(label)]
        for budget in summary.budgets:
            cell = cells.get(budget)
            if cell is None:
                row.append(Cell("–"))
                continue
            text = f"{100 * cell.share:.1f} %"
            if cell.num_compared < summary.num_compared:
                text += f" ({cell.num_compared}/{summary.num_compared})"
            row.append(Cell(text, cell.share, min(cell.share, 1), best.get(budget) == label))
        rows.append(row)
    return Table("of the full cache's score, by budget", columns, rows)


def _best(summary: Summary, budget: Any) -> str | None:
    """The label with the largest share, of those that ran all tasks in all settings."""
    complete = {
        label: cells[budget].share
        for label, cells in summary.cells.items()
        if budget in cells and cells[budget].num_compared == summary.num_compared
    }
    return max(complete, key=lambda label: complete[label]) if len(complete) > 1 else None


def of_shares(summary: Summary) -> Table:
    """The same by task: a row for each policy and budget."""
    columns = [("policy", False), ("budget", True), *((task, True) for task in summary.tasks)]
    rows = []
    for label, cells in summary.cells.items():
        for budget, cell in cells.items():
            row = [Cell(label), Cell(reading.budget_text(budget) or "all", number(budget))]
            for task in summary.tasks:
                share = cell.by_task.get(task)
                row.append(Cell("–") if share is None else Cell(f"{100 * share:.1f} %", share))
            rows.append(row)
    return Table("by task", columns, rows)
