"""Makes the tables in README.md and docs/ from benchmarks/results/*.jsonl.

    python benchmarks/tables.py           # writes them
    python benchmarks/tables.py --check   # exit code 1 and a line for each file that would change

A table stands between the comments `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from paged_kv import results
from paged_kv.eval.peers.peers import NAMES
from paged_kv.report.rows import latest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- table ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LITTLE = 5  # percent of perplexity
BESIDE_PEERS = ("streaming", "snapkv", "tova", "keydiff", "knorm", "expected_attention", "h2o",
                "pyramidal")  # fmt: skip
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


def rise(several: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float]:
    """By how many percent perplexity is above that of the full cache; the standard error.

    Over all windows of all texts, each compared with the same window.

    Args:
        several: of one policy and budget, a row for each text.
        rows: all of perplexity.
    """
    full = {row["text"]: row for row in rows if row["policy"] == "full"}
    differences = [
        window["nll"] - other["nll"]
        for row in several
        for window, other in zip(row["windows"], full[row["text"]]["windows"], strict=True)
    ]
    error = stdev(differences) / math.sqrt(len(differences))
    return 100 * math.expm1(fmean(differences)), 100 * error


def perplexity(rows: Sequence[Row]) -> list[str]:
    """The rise, by policy and budget."""
    found = [row for row in rows_of("perplexity", rows) if row["policy"] not in NAMES]

    def cell(several: Sequence[Row]) -> str:
        return "{:.1f} ± {:.1f}".format(*rise(several, found))

    return grid([row for row in found if row["budget"]], cell, 1)


def peers(rows: Sequence[Row]) -> list[str]:
    """Peers, and our policies beside them, on the texts that peers have read."""
    found = rows_of("perplexity", rows)
    texts = {row["text"] for row in found if row["policy"] in NAMES}
    found = [row for row in found if row["text"] in texts]
    whole = next(row["bytes_per_token"] for row in found if row["policy"] == "full")
    budgets = {row["budget"] for row in found if row["policy"] in NAMES}
    cases: dict[tuple[str, Any], list[Row]] = {}
    for row in found:
        if row["policy"] in (*NAMES, *BESIDE_PEERS) and row["budget"] in budgets:
            cases.setdefault((row["policy"], row["budget"]), []).append(row)
    lines = []
    for (policy, budget), several in cases.items():
        share = 100 * fmean(row["bytes_per_token"] for row in several) / whole
        above, error = rise(several, found)
        text = f"{budget:,}" if budget else ""
        cells = f"| `{policy}` | {text} | {share:.1f} % | {above:.1f} ± {error:.1f} |"
        lines.append((share, above, cells))
    head = ["| cache | entries | bytes | percent above |", "| --- " * 4 + "|"]
    return head + [cells for *_, cells in sorted(lines, reverse=True)]


def memory(rows: Sequence[Row]) -> list[str]:
    """For each budget the memory that is saved, the best policies, and how many are below 5 %."""
    found = [row for row in rows_of("perplexity", rows) if row["policy"] not in NAMES]
    whole = max(row["kept"] for row in found)
    lines = ["| entries | less memory | policies below 5 % | the best |", "| --- " * 4 + "|"]
    for budget in sorted({row["budget"] for row in found if row["budget"]}, reverse=True):
        here = [row for row in found if row["budget"] == budget]
        names = dict.fromkeys(row["policy"] for row in here)
        rises = {
            name: rise([row for row in here if row["policy"] == name], found)[0] for name in names
        }
        best = sorted(rises, key=rises.__getitem__)[:3]
        below = sum(value < LITTLE for value in rises.values())
        named = ", ".join(f"`{name}` {rises[name]:.1f} %" for name in best)
        share = f"{100 * (1 - budget / whole):.0f} %"
        lines.append(f"| {budget:,} | {share} | {below} of {len(rises)} | {named} |")
    return lines


def needle(rows: Sequence[Row], question: str) -> list[str]:
    """Keys found, in percent; most with the largest budget first."""
    found = [row for row in rows_of("needle", rows) if row["question"] == question]

    def share(several: Sequence[Row]) -> str:
        return f"{100 * several[0]['score']:.0f}"

    lines = grid([row for row in found if row["budget"]], share, -1)
    return lines[:2] + lines[:1:-1]


def demo(_: Sequence[Row]) -> list[str]:
    """What `make demo` said: results/demo.json of one run, kept beside the rows."""
    report = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    settings, engines = report["settings"], report["engines"]
    plain = next(iter(engines.values()))
    megabytes = plain["pool_pages"] * plain["page_bytes"] / 1e6
    longest = round(plain["kv_cache_tokens"] / plain["kv_cache_sequences"])
    speeds = [f"{figures['tokens_per_second']:.0f}" for figures in engines.values()]
    speeds[-1] += f" ({report['speed_ratio']:.2f} x)"
    table = {
        f"SmolLM2-135M, {settings['requests']} requests of {settings['max_tokens']} tokens, "
        f"{megabytes:.0f} MB": list(engines),
        "---": ["---"] * len(engines),
        f"longest sequences ({longest} tokens) that can decode at once": [
            f"{figures['decode_sequences']:.1f}" for figures in engines.values()
        ],
        "preemptions": [str(figures["preemptions"]) for figures in engines.values()],
        "output tokens per second": speeds,
    }
    return [f"| {name} | {' | '.join(cells)} |" for name, cells in table.items()]


def sequences(rows: Sequence[Row]) -> list[str]:
    """What a sequence takes of the pool, counted in engines, and how many decode at once."""
    found = rows_of("memory", rows)
    lines = ["| cache | pages | MB of a sequence | sequences at once |", "| --- " * 4 + "|"]
    for row in found:
        megabytes, at_once = f"{row['score'] / 1e6:.1f}", f"{row['decode_sequences']:.1f}"
        budget = f" {row['budget']:,}" if row["budget"] else ""
        lines.append(
            f"| `{row['policy']}`{budget} | {row['page_format']} | {megabytes} | {at_once} |"
        )
    return lines


def full(rows: Sequence[Row]) -> list[str]:
    """The full cache in every task."""
    lines = ["| task | score | metric | samples |", "| --- | --- | --- | --- |"]
    for row in rows:
        if row["policy"] == "full":
            text = f" {row.get('text') or row.get('question') or ''}".rstrip()
            error = row["standard_error"]
            score = f"{row['score']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            lines.append(f"| {row['task']}{text} | {score} | {row['metric']} | {row['samples']} |")
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "perplexity": perplexity,
    "memory": memory,
    "peers": peers,
    "needle-hidden": partial(needle, question="hidden"),
    "needle-seen": partial(needle, question="seen"),
    "sequences": sequences,
    "full": full,
    "demo": demo,
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
