"""What all charts share: axes, curves with error bars, and their names beside or below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from paged_kv.report import style
from paged_kv.report.style import Look

Points = Sequence[tuple[float, float]]
ROW = 0.19  # inches: a line of a legend
FEWEST = 5  # curves among which one can be far from the others


class Curve(NamedTuple):
    """A named line through points, by x."""

    label: str
    points: Points
    look: Look
    errors: Sequence[float | None] = ()  # standard errors of the points, or none


def new(title: str, rows: int = 1, height: float = 2.9) -> tuple[Figure, list[Any]]:
    """A figure of `rows` axes below each other that share their x."""
    figure = Figure(figsize=(style.WIDTH, height * (1 if rows == 1 else 0.75 * rows)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(wrapped(title))
    return figure, list(axes)


def wrapped(title: str, columns: int = 60) -> str:
    """In lines that a figure holds; breaks stand at blanks, but not before a dot."""
    lines = [""]
    for word in title.replace(" ·", "\u00a0·").split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def draw(axes: Any, curve: Curve) -> None:
    """The line, its markers and error bars."""
    order = sorted(range(len(curve.points)), key=lambda index: curve.points[index])
    x, y = zip(*(curve.points[index] for index in order), strict=True)
    color, linestyle, marker = curve.look
    drawn = {"color": color, "linestyle": linestyle, "marker": marker}
    drawn |= {"markeredgecolor": style.SURFACE, "markeredgewidth": 0.6}
    if any(curve.errors):
        errors = [curve.errors[index] or 0 for index in order]
        axes.errorbar(x, y, yerr=errors, elinewidth=0.9, capsize=2, **drawn)
    else:
        axes.plot(x, y, **drawn)


def outliers(curves: Sequence[Curve]) -> list[Curve]:
    """Curves that lie as a whole so far from the others that these would become one line.

    Beyond 1.5 times the distance of the quartiles of all points (Tukey's fences).
    """
    if len(curves) < FEWEST:
        return []
    low, _, high = quantiles([y for curve in curves for _, y in curve.points], n=4)
    margin = 1.5 * (high - low)
    return [
        curve
        for curve in curves
        if all(y < low - margin or y > high + margin for _, y in curve.points)
    ]


def focus(axes: Any, curves: Sequence[Curve], levels: Sequence[float]) -> None:
    """Shows these curves with their error bars, and these heights, but nothing beyond them."""
    heights = list(levels)
    for curve in curves:
        errors = curve.errors or [None] * len(curve.points)
        for (_, y), error in zip(curve.points, errors, strict=True):
            heights += [y - (error or 0), y + (error or 0)]
    room = 0.06 * (max(heights) - min(heights))
    axes.set_ylim(min(heights) - room, max(heights) + room)


def name(figure: Figure, axes: Any, curves: Sequence[Curve]) -> None:
    """Few curves get their names at their right ends, many a legend below the figure."""
    longest = max(len(curve.label) for curve in curves)
    if len(curves) <= style.DIRECT and longest <= 28:
        _ends(axes, curves)
        return
    columns = 3 if longest <= 12 else 2 if longest <= 28 else 1
    handles = []
    for curve in curves:
        color, linestyle, marker = curve.look
        (handle,) = axes.plot([], [], color=color, linestyle=linestyle, marker=marker)
        handles.append(handle)
    labels = [_visible(wrapped(curve.label)) for curve in curves]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + ROW * -(-lines // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.8,
                  columnspacing=1.2)  # fmt: skip


def _visible(label: str) -> str:
    """Matplotlib hides what begins with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _ends(axes: Any, curves: Sequence[Curve]) -> None:
    axes.figure.draw_without_rendering()  # settles the limits
    places = []
    for curve in curves:
        points = [axes.transData.transform(point) for point in curve.points]
        height = axes.transAxes.inverted().transform(max(points, key=lambda point: point[0]))[1]
        places.append((float(height), curve))
    places.sort(key=lambda place: place[0])
    gap = 0.18 / (axes.get_window_extent().height / axes.figure.dpi)
    heights = spread([height for height, _ in places], gap)
    for height, (_, curve) in zip(heights, places, strict=True):
        axes.annotate(
            curve.label,
            (1.02, height),
            xycoords="axes fraction",
            color=curve.look.color,
            va="center",
            fontsize=9,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights, ascending, moved so that none is closer than `gap` to the next nor far from 0..1."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    over = max(0.0, found[-1] - 1) if found else 0.0
    for index in reversed(range(len(found))):
        limit = found[index + 1] - gap if index + 1 < len(found) else found[index] - over
        found[index] = min(found[index], limit)
    return found


def level(axes: Any, height: float, text: str, error: float | None = None) -> None:
    """A dashed line across, with its meaning at the left; its standard error as a band."""
    axes.axhline(height, color=style.FULL, linewidth=1.1, linestyle="--", zorder=1)
    if error:
        axes.axhspan(height - error, height + error, color=style.FULL, alpha=0.13, linewidth=0)
    axes.annotate(text, (0, height), (3, 2.5), xycoords=("axes fraction", "data"),
                  textcoords="offset points", color=style.MUTED, fontsize=8.5)  # fmt: skip


def from_zero(axes: Any, curves: Sequence[Curve], least: float = 0) -> None:
    """The y axis from 0 to above all points, at least to `least`."""
    axes.set_ylim(0, 1.08 * max([least, *(y for curve in curves for _, y in curve.points)]))


def scale_x(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic for values that double and double again; ticks where the values are."""
    low, high = min(values), max(values)
    if high < 1.25 * low:  # one budget, whose entries differ a little
        axes.set_xlim(0.5 * low, 1.5 * high)
    if low <= 0 or high < 3 * low:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        return
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = _apart(sorted(set(values)), (high / low) ** (1 / 7))
    axes.set_xticks(ticks, [f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in ticks])


def _apart(values: Sequence[float], ratio: float) -> list[float]:
    """Those of ascending values whose labels do not run into each other."""
    found: list[float] = []
    for value in values:
        if not found or value >= found[-1] * ratio:
            found.append(value)
    return found


def curves_of(series: Mapping[str, Points], looks: Mapping[str, Look]) -> list[Curve]:
    """Those that have points."""
    return [Curve(label, points, looks[label]) for label, points in series.items() if points]
