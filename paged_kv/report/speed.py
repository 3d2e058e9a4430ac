"""Charts of speed: throughput by the size of the pool, latency by the rate of requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from paged_kv.core.page_formats import NATIVE
from paged_kv.report import charts, style
from paged_kv.report import rows as reading
from paged_kv.report.charts import Curve, Points
from paged_kv.report.rows import Group, number
from paged_kv.report.style import Look, Plot
from paged_kv.results import Row

PLAIN = "plain"  # the policy of vLLM without us


def is_plain(row: Row) -> bool:
    """Whether it is what throughput and latency are compared with."""
    return PLAIN in (row["policy"], row.get("case")) and row["page_format"] in (NATIVE, None)


def crossings(points: Points) -> list[float]:
    """The x, between points ascending in x, where y passes 1; linear in between."""
    points = sorted(points)
    found = [x for x, y in points if y == 1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if (y0 - 1) * (y1 - 1) < 0:
            found.append(x0 + (x1 - x0) * (1 - y0) / (y1 - y0))
    return sorted(found)


def throughput(group: Group, looks: Mapping[str, Look]) -> Plot | None:
    """Output tokens per second, and below that the ratio over plain vLLM."""
    rows = [row for row in group.rows if number(row["score"]) and number(row.get("share"))]
    if not rows:
        return None
    speed, ratio = [], []
    for label, members in reading.curves(rows).items():
        look = looks[label]
        speed.append(Curve(label, [(row["share"], row["score"]) for row in members], look))
        ratios = [(row["share"], row["ratio"]) for row in members if number(row.get("ratio"))]
        if ratios and not is_plain(members[0]):
            ratio.append(Curve(label, ratios, look))
    figure, axes = charts.new(group.title, rows=2 if ratio else 1)
    for curve in speed:
        charts.draw(axes[0], curve)
    axes[0].set(ylabel="output tokens/s")
    charts.from_zero(axes[0], speed)
    caption = _draw_ratios(axes[1], ratio) if ratio else ""
    axes[-1].set(xlabel="pool / what all requests need uncompressed  (ample → tight)")
    axes[-1].invert_xaxis()
    charts.name(figure, axes[0], speed)
    return Plot(group.title, caption, figure)


def _draw_ratios(axes: Any, curves: Sequence[Curve]) -> str:
    """Draws; says where the curves pass plain vLLM."""
    equal: list[str] = []
    never: dict[str, list[str]] = {"Faster": [], "Slower": []}
    for curve in curves:
        charts.draw(axes, curve)
        found = crossings(curve.points)
        for x in found:
            axes.plot([x], [1], "o", markersize=9, markerfacecolor="none",
                      markeredgecolor=curve.look.color, zorder=5)  # fmt: skip
            if len(curves) <= style.DIRECT:
                axes.annotate(f"{x:.2f}", (x, 1), (0, -15), textcoords="offset points",
                              ha="center", fontsize=8.5, color=curve.look.color)  # fmt: skip
        if found:
            equal.append(f"{curve.label} {' and '.join(f'{x:.2f}' for x in found)}")
        else:
            never["Faster" if curve.points[0][1] > 1 else "Slower"].append(curve.label)
    charts.level(axes, 1, "plain")
    axes.set(ylabel="over plain")
    charts.from_zero(axes, curves, least=1)
    sentences = [f"As fast as plain at a pool of: {', '.join(equal)}."] if equal else []
    sentences += [
        f"{how} at every size measured: {', '.join(names)}."
        for how, names in never.items()
        if names
    ]
    return " ".join(sentences)


def latency(group: Group, looks: Mapping[str, Look]) -> Iterator[Plot]:
    """By request rate, median above and 99th percentile below: to the first token, between tokens.

    Those that are in the rows.
    """
    rows = [row for row in group.rows if number(row.get("request_rate"))]
    for name, text in (("ttft", "Time to first token"), ("itl", "Time between tokens")):
        medians, tails = (_curves(rows, f"{name}_{end}", looks) for end in ("ms", "p99_ms"))
        if not medians:
            continue
        title = f"{', '.join(filter(None, (text, group.setting)))} · {group.place}"
        figure, axes = charts.new(title, rows=2 if tails else 1)
        for chart, curves, which in zip(axes, (medians, tails), ("median", "p99"), strict=False):
            for curve in curves:
                charts.draw(chart, curve)
            chart.set(ylabel=f"{which} (ms)")
            charts.from_zero(chart, curves)
        axes[-1].set(xlabel="requests per second")
        charts.name(figure, axes[-1], tails or medians)
        yield Plot(title, "Lower is better. p99: the 99th percentile.", figure)


def _curves(rows: Sequence[Row], field: str, looks: Mapping[str, Look]) -> list[Curve]:
    """The field by request rate, of those that have it."""
    rows = [row for row in rows if number(row.get(field))]
    return [
        Curve(label, [(row["request_rate"], row[field]) for row in members], looks[label])
        for label, members in reading.curves(rows).items()
    ]
