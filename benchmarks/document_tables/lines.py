"""Rows found, and lines of Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def rows_of(task: str, rows: Sequence[Row], **fields: Any) -> list[Row]:
    """Of a task by its whole name, with these fields. Raises ValueError: there are none."""
    found = [row for row in rows if row["task"] == task]
    found = [row for row in found if all(row[name] == fields[name] for name in fields)]
    if not found:
        raise ValueError(f"benchmarks/results has no rows of {task} {fields or ''}".rstrip())
    return found


def head(*names: str) -> list[str]:
    """The names of the columns."""
    return [line(names), "| --- " * len(names) + "|"]


def line(cells: Iterable[str]) -> str:
    """One row."""
    return f"| {' | '.join(cells)} |"


def grid(
    rows: Sequence[Row],
    cell: Callable[[Sequence[Row]], str],
    order: int,
    highest_first: bool = False,
) -> list[str]:
    """A line for each policy, a column for each budget; best first by the column `order`.

    Args:
        rows: of policies with budgets.
        cell: from the rows of a policy and budget, which begins with what lines are sorted by.
        order: of the budgets, the one to sort by.
        highest_first: the highest is the best.
    """
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        cells = []
        for budget in budgets:
            found = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
            cells.append(cell(found) if found else "")
        lines.append((policy, cells))
    lines.sort(key=lambda one: _number(one[1][order], highest_first))
    names = [f"{budget:,}" for budget in budgets]
    return head("policy", *names) + [line([f"`{policy}`", *cells]) for policy, cells in lines]


def single(several: Sequence[Row]) -> Row:
    """The row of a case. Raises ValueError: there are more, which are not the same measurement."""
    if len(several) > 1:
        first = {name: several[0][name] for name in ("task", "policy", "budget")}
        raise ValueError(f"benchmarks/results has {len(several)} rows of {first}")
    return several[0]


def _number(cell: str, highest_first: bool) -> float:
    if not cell:
        return math.inf
    return float(cell.split()[0].replace(",", "")) * (-1 if highest_first else 1)


def percent(row: Row) -> str:
    """A score between 0 and 1, with its standard error."""
    error = row["standard_error"]
    return f"{100 * row['score']:.0f}" + (f" ± {100 * error:.0f}" if error is not None else "")
