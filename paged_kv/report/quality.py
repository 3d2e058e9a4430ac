"""Charts of quality: against memory, by position, by layer, by depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from paged_kv.report import charts
from paged_kv.report import rows as reading
from paged_kv.report.charts import Curve
from paged_kv.report.rows import Group, number
from paged_kv.report.style import Look, Plot
from paged_kv.report.summary import Summary
from paged_kv.results import Row

Looks = Mapping[str, Look]
SAME = 1e-4  # scores have six digits, and another run of full differs by float32's noise
AXES = {  # field -> what it is
    "bytes_per_token": "bytes of keys and values per token of context",
    "kept": "entries kept per layer",
}


def means(summary: Summary, looks: Looks) -> Plot | None:
    """The share of the full cache's score that remains, by the share of its memory."""
    curves = []
    for label, cells in summary.cells.items():
        points = [
            (100 * cell.memory, 100 * cell.share)
            for budget, cell in cells.items()
            if budget is not None and cell.memory and cell.num_compared == summary.num_compared
        ]
        if points:
            curves.append(Curve(label, points, looks[label]))
    if not curves:
        return None
    title = f"Mean over tasks · {summary.place}"
    figure, (axes,) = charts.new(title)
    for curve in curves:
        charts.draw(axes, curve)
    charts.level(axes, 100, "full cache")
    charts.scale_x(axes, [x for curve in curves for x, _ in curve.points])
    axes.set(xlabel="% of the full cache's bytes", ylabel="% of the full cache's score")
    charts.name(figure, axes, curves)
    tasks = ", ".join(summary.tasks)
    return Plot(title, f"Up and left is better. Means over {tasks}, as in the table.", figure)


def against_memory(group: Group, looks: Looks) -> Plot | None:
    """The score by memory: a curve for each policy, through its budgets."""
    drawn = [row for row in group.rows if number(row["score"]) is not None]
    rows = [row for row in drawn if not reading.is_full(row)]
    field = next((name for name in AXES if all(number(row[name]) for row in rows)), None)
    if not rows or field is None:
        return None
    full = [row for row in drawn if reading.is_full(row)]
    paired = is_paired(rows, full)
    curves = []
    for label, members in reading.curves(rows).items():
        members.sort(key=lambda row: row[field])
        points = [(row[field], row["score"]) for row in members]
        errors = [number(row["vs_first_se" if paired else "standard_error"]) for row in members]
        curves.append(Curve(label, points, looks[label], errors))
    figure, (axes,) = charts.new(group.title)
    for curve in curves:
        charts.draw(axes, curve)
    far = charts.outliers(curves)
    if far:
        near = [curve for curve in curves if curve not in far]
        charts.focus(axes, near, [row["score"] for row in full])
    for row in full:
        size = f" ({row[field]:,.0f})" if number(row[field]) else ""
        charts.level(axes, row["score"], row["label"] + size, number(row["standard_error"]))
    charts.scale_x(axes, [row[field] for row in rows])
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    axes.set(xlabel=AXES[field], ylabel=f"{group.metric} ({better} is better)")
    charts.name(figure, axes, curves)
    return Plot(group.title, _caption(drawn, better, paired, far), figure)


def is_paired(rows: Sequence[Row], full: Sequence[Row]) -> bool:
    """Whether all rows know the error of their difference to the full cache, sample by sample."""
    if len(full) != 1 or not all(number(row.get("vs_first_se")) is not None for row in rows):
        return False
    differences = (row["score"] - full[0]["score"] - row["vs_first"] for row in rows)
    return all(abs(difference) < SAME for difference in differences)


def _caption(rows: Sequence[Row], better: str, paired: bool, far: Sequence[Curve]) -> str:
    samples = sorted({row["samples"] for row in rows if number(row["samples"])})
    caption = f"{better.capitalize()} is better."
    if samples:
        ends = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
        caption += f" {ends} samples."
    if paired:
        caption += " Bars are standard errors of the difference to the full cache."
    elif any(row["standard_error"] for row in rows):
        caption += " Bars are standard errors."
    if far:
        named = []
        for curve in far:
            heights = [y for _, y in curve.points]
            bounds = dict.fromkeys(f"{y:.3g}" for y in (min(heights), max(heights)))
            named.append(f"{curve.label} ({' to '.join(bounds)})")
        caption += f" Out of sight: {', '.join(named)}."
    return caption


def by_position(group: Group, looks: Looks) -> Iterator[Plot]:
    """Agreement by the position of the token, a figure for each budget.

    What has no budget, as a cache in fewer bits, is in all of them.
    """
    having = [row for row in group.rows if row.get("by_position") and not reading.is_full(row)]
    everywhere = [row for row in having if row["budget"] is None]
    for budget, rows in _by_budget(having) or [(None, [])]:
        curves = []
        for label, members in reading.curves([*rows, *everywhere]).items():
            points = [(each["position"], each["agreement"]) for each in members[0]["by_position"]]
            curves.append(Curve(label, points, looks[label]))
        if not curves:
            return
        of_budget = f", budget {reading.budget_text(budget)}" if rows else ""
        title = f"{group.name} by position{of_budget} · {group.place}"
        figure, (axes,) = charts.new(title)
        for curve in curves:
            charts.draw(axes, curve)
        axes.set(xlabel="position of the token", ylabel="share of equal tokens")
        axes.set_ylim(0, 1.02)
        charts.name(figure, axes, curves)
        yield Plot(title, "1 means: the same token as with the full cache.", figure)


def by_layer(groups: Sequence[Group], looks: Looks) -> Iterator[Plot]:
    """Entries by layer, a figure for each budget: of the memory task, or else of the first."""
    having = [g for g in groups if any(row.get("kept_by_layer") for row in g.rows)]
    for group in [g for g in having if g.task == reading.MEMORY] or having[:1]:
        for budget, rows in _by_budget(row for row in group.rows if row.get("kept_by_layer")):
            yield _layers(group, budget, reading.curves(rows), looks)


def _layers(group: Group, budget: Any, series: Mapping[str, list[Row]], looks: Looks) -> Plot:
    parts = ("Entries by layer", f"budget {reading.budget_text(budget)}", group.setting)
    title = f"{', '.join(filter(None, parts))} · {group.place}"
    figure, (axes,) = charts.new(title)
    curves = []
    same: dict[tuple[float, ...], list[str]] = defaultdict(list)  # many policies hold the same
    for label, rows in series.items():
        same[tuple(rows[0]["kept_by_layer"])].append(label)
    for kept, labels in same.items():
        look = looks[labels[0]]._replace(linestyle="-", marker="")
        edges = [index - 0.5 for index in range(len(kept) + 1)]
        axes.stairs(kept, edges, baseline=None, color=look.color, linewidth=1.7)
        curves.append(Curve(", ".join(labels), list(enumerate(kept)), look))
    axes.set(xlabel="layer", ylabel="entries kept", xlim=(-0.5, len(curves[0].points) - 0.5))
    charts.from_zero(axes, curves)
    axes.xaxis.get_major_locator().set_params(integer=True)
    charts.name(figure, axes, curves)
    return Plot(title, f"What each layer held, measured by {group.task}.", figure)


def _by_budget(rows: Iterable[Row]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal budget, without those that have none."""
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row["budget"] is not None:
            found[row["budget"]].append(row)
    return sorted(found.items(), key=lambda item: reading.budget_order(item[0]))
