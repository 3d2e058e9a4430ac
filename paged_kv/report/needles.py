"""Heatmaps of what was found: depth by length, a small one for each policy and budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import Normalize

from paged_kv.report import charts, style
from paged_kv.report import rows as reading
from paged_kv.report.rows import Group
from paged_kv.report.style import Plot
from paged_kv.results import Row

GAP = 0.8  # cells between two maps
TICKS = 12  # at most, below all maps of a row
SHARES = Normalize(0, 1)


def needles(group: Group) -> Plot | None:
    """A row of maps for each policy, a column for each budget; None without cells.

    One pair of axes holds all maps, beside each other: a hundred pairs take minutes to draw.
    """
    rows = [row for row in group.rows if row.get("cells")]
    if not rows:
        return None
    series = reading.curves(rows)
    budgets = sorted({row["budget"] for row in rows}, key=reading.budget_order)
    lengths = sorted({cell["length"] for row in rows for cell in row["cells"]})
    depths = sorted({cell["depth"] for row in rows for cell in row["cells"]})
    wide, high = len(lengths) + GAP, len(depths) + GAP
    title = f"{group.name}: what was found · {group.place}"
    figure, (axes,) = charts.new(title, height=1.4 + 0.8 * len(series))
    deep = [f"{n:.3g}" for n in depths]
    beside = -6 - 5 * max(map(len, deep)), 0  # points: the labels of depths are as wide
    for line, (label, members) in enumerate(series.items()):
        axes.annotate(charts.wrapped(label, 18), (0, (line + 0.5) * high - GAP / 2), beside,
                      axes.get_yaxis_transform(), "offset points", ha="right", va="center",
                      fontsize=8.5)  # fmt: skip
        for row in members:
            corner = (budgets.index(row["budget"]) * wide, line * high)
            image = _map(axes, row, lengths, depths, corner)
    for column, budget in enumerate(budgets):
        axes.text(column * wide + len(lengths) / 2, -0.4, reading.budget_text(budget) or "all",
                  ha="center", va="bottom", fontsize=9, fontweight="bold")  # fmt: skip
    across, down = [n * wide for n in range(len(budgets))], [n * high for n in range(len(series))]
    _ticks(axes.xaxis, [_short(n) for n in lengths], across, TICKS // len(across))
    _ticks(axes.yaxis, deep, down, 4)
    axes.set(xlim=(-0.2, len(budgets) * wide - GAP + 0.2), ylim=(len(series) * high - GAP + 0.2, 0))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=45, shrink=0.9)
    bar.set_label("share of the needles found")
    caption = "A row for each policy, a column for each budget. In each: across the length of the "
    return Plot(title, caption + "context, down the depth of the needle in %.", figure)


def _map(
    axes: Any,
    row: Row,
    lengths: Sequence[int],
    depths: Sequence[float],
    corner: tuple[float, float],
) -> Any:
    values = [[float("nan")] * len(lengths) for _ in depths]
    for cell in row["cells"]:
        share = cell["found"] / cell["asked"] if cell["asked"] else float("nan")
        values[depths.index(cell["depth"])][lengths.index(cell["length"])] = share
    x = [corner[0] + index for index in range(len(lengths) + 1)]
    y = [corner[1] + index for index in range(len(depths) + 1)]
    return axes.pcolormesh(x, y, values, cmap="cividis", norm=SHARES, edgecolors=style.SURFACE,
                           linewidth=0.7)  # fmt: skip


def _ticks(axis: Any, labels: Sequence[str], starts: Sequence[float], most: int) -> None:
    """Some of the labels, at the middles of their cells, once for each start of a map."""
    shown = range(0, len(labels), -(-len(labels) // max(1, most)))
    places = [start + index + 0.5 for start in starts for index in shown]
    axis.set_ticks(places, [labels[index] for index in shown] * len(starts))
    axis.set_tick_params(labelsize=7, length=0, pad=1)


def _short(length: int) -> str:
    return f"{length / 1024:.3g}k" if length >= 1024 else f"{length}"
