"""How well texts are predicted, by policy, budget, page format; peers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from document_tables.lines import Row, grid, head, line, rows_of
from paged_kv.core.page_formats import NATIVE
from paged_kv.eval.peers.peers import NAMES
from paged_kv.report.rows import is_full

LITTLE = 5  # percent of perplexity
BESIDE_PEERS = ("streaming", "snapkv", "tova", "keydiff", "knorm", "expected_attention", "h2o",
                "pyramidal")  # fmt: skip


def rise(several: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float]:
    """By how many percent perplexity is above that of the full cache; the standard error.

    Over all windows of all texts, each compared with the same window.

    Args:
        several: of one case, a row for each text.
        rows: all of perplexity.
    """
    full = {row["text"]: row for row in rows if is_full(row)}
    differences = [
        window["nll"] - other["nll"]
        for row in several
        for window, other in zip(row["windows"], full[row["text"]]["windows"], strict=True)
    ]
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def perplexity(rows: Sequence[Row]) -> list[str]:
    """The rise, by policy and budget."""
    found = _native(rows)

    def cell(several: Sequence[Row]) -> str:
        return "{:.1f} ± {:.1f}".format(*rise(several, found))

    return grid([row for row in found if row["budget"]], cell, 1)


def _native(rows: Sequence[Row]) -> list[Row]:
    """Of our policies."""
    found = rows_of("perplexity", rows, page_format=NATIVE)
    return [row for row in found if row["policy"] not in NAMES]


def memory(rows: Sequence[Row]) -> list[str]:
    """For each budget the memory that is saved, the best policies, and how many are below 5 %."""
    found = _native(rows)
    whole = max(row["kept"] for row in found)
    lines = head("entries", "less memory", "policies below 5 %", "the best")
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
        lines.append(line([f"{budget:,}", share, f"{below} of {len(rises)}", named]))
    return lines


def formats(rows: Sequence[Row]) -> list[str]:
    """The bytes, and the rise, of cases that were run in several page formats: largest first."""
    found = rows_of("perplexity", rows)
    whole = next(row["bytes_per_token"] for row in found if is_full(row))
    cases: dict[tuple[str, Any], dict[str, list[Row]]] = {}
    for row in found:
        by_format = cases.setdefault((row["policy"], row["budget"]), {})
        by_format.setdefault(row["page_format"], []).append(row)
    lines = []
    for (policy, budget), by_format in cases.items():
        name = f"`{policy}`" + (f" {budget:,}" if budget else "")
        for page_format, several in by_format.items() if len(by_format) > 1 else ():
            share = 100 * fmean(row["bytes_per_token"] for row in several) / whole
            above = "{:.1f} ± {:.1f}".format(*rise(several, found))
            lines.append((share, name, line([name, page_format, f"{share:.1f} %", above])))
    return head("cache", "pages", "bytes", "percent above") + [
        text for *_, text in sorted(lines, reverse=True)
    ]


def peers(rows: Sequence[Row]) -> list[str]:
    """Peers, and our policies beside them, on the texts that peers have read."""
    found = rows_of("perplexity", rows)
    texts = {row["text"] for row in found if row["policy"] in NAMES}
    found = [row for row in found if row["text"] in texts]
    whole = next(row["bytes_per_token"] for row in found if is_full(row))
    budgets = {row["budget"] for row in found if row["policy"] in NAMES}
    cases: dict[tuple[str, Any], list[Row]] = {}
    for row in found:
        ours = row["policy"] in BESIDE_PEERS and row["page_format"] == NATIVE
        if (ours or row["policy"] in NAMES) and row["budget"] in budgets:
            cases.setdefault((row["policy"], row["budget"]), []).append(row)
    lines = []
    for (policy, budget), several in cases.items():
        share = 100 * fmean(row["bytes_per_token"] for row in several) / whole
        above, error = rise(several, found)
        text = f"{budget:,}" if budget else ""
        cells = [f"`{policy}`", text, f"{share:.1f} %", f"{above:.1f} ± {error:.1f}"]
        lines.append((share, above, line(cells)))
    return head("cache", "entries", "bytes", "percent above") + [
        text for *_, text in sorted(lines, reverse=True)
    ]
