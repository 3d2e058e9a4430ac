"""Makes the tables in README.md and docs/ from benchmarks/results/*.jsonl.

    python benchmarks/tables.py           # writes them
    python benchmarks/tables.py --check   # exit code 1 and a line for each file that would change

A table stands between the comments `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from paged_kv import results
from paged_kv.report.rows import latest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- table ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def rows_of(task: str, rows: Sequence[Row]) -> list[Row]:
    """Of a task by its whole name. Raises ValueError: there are none."""
    found = [row for row in rows if row["task"] == task]
    if not found:
        raise ValueError(f"benchmarks/results has no rows of {task}")
    return found


def grid(rows: Sequence[Row], cell: Callable[[Sequence[Row]], str], order: int) -> list[str]:
    """A line for each policy, a column for each budget; best first by the column `order`.

    Args:
        rows: of policies with budgets.
        cell: from the rows of a policy and budget, which begins with what lines are sorted by.
        order: of the budgets, the one to sort by.
    """
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        cells = []
        for budget in budgets:
            found = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
            cells.append(cell(found) if found else "")
        lines.append((policy, cells))
    lines.sort(key=lambda line: _number(line[1][order]))
    head = ["| policy | " + " | ".join(f"{budget:,}" for budget in budgets) + " |"]
    head.append("| --- " * (1 + len(budgets)) + "|")
    return head + [f"| `{policy}` | " + " | ".join(cells) + " |" for policy, cells in lines]


def _number(cell: str) -> float:
    return float(cell.split()[0].replace(",", "")) if cell else math.inf


def perplexity(rows: Sequence[Row]) -> list[str]:
    """How much more loss than the full cache, over all texts' windows, in percent of perplexity."""
    found = rows_of("perplexity", rows)
    full = {row["text"]: row for row in found if row["policy"] == "full"}

    def rise(several: Sequence[Row]) -> str:
        differences = [
            window["nll"] - other["nll"]
            for row in several
            for window, other in zip(row["windows"], full[row["text"]]["windows"], strict=True)
        ]
        error = stdev(differences) / math.sqrt(len(differences))
        return f"{100 * math.expm1(fmean(differences)):.1f} ± {100 * error:.1f}"

    return grid([row for row in found if row["budget"]], rise, 1)


def needle(rows: Sequence[Row]) -> list[str]:
    """Keys found, in percent."""
    found = rows_of("needle", rows)

    def share(several: Sequence[Row]) -> str:
        return f"{100 * several[0]['score']:.0f}"

    lines = grid([row for row in found if row["budget"]], share, 1)
    return lines[:2] + lines[:1:-1]  # most first


def full(rows: Sequence[Row]) -> list[str]:
    """The full cache in every task."""
    lines = ["| task | score | metric | samples |", "| --- | --- | --- | --- |"]
    for row in rows:
        if row["policy"] == "full":
            text = f" {row['text']}" if "text" in row else ""
            error = row["standard_error"]
            score = f"{row['score']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            lines.append(f"| {row['task']}{text} | {score} | {row['metric']} | {row['samples']} |")
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "perplexity": perplexity,
    "needle": needle,
    "full": full,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or compares; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    rows, _ = latest(results.read(sorted(RESULTS.glob("*.jsonl"))))
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = BLOCK.sub(
            lambda block: block[1] + "\n".join(TABLES[block[2]](rows)) + "\n" + block[4], before
        )
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'differs from benchmarks/results' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
