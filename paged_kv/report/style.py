"""How figures look: one style for PNG and page, and a look of its own for each curve.

Figures are drawn in the light colors below; inline, each of these is a CSS variable instead, so
that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from paged_kv.bench import plot

INK, MUTED, SURFACE, FULL = "#1f2328", "#59636e", "#fefefe", plot.COLORS[0]
# After Okabe and Ito, as dark as a white page needs; lightness differs where hues are confused.
SERIES = ("#0072b2", "#d55e00", "#009e7a", "#a3439b", "#b58900", "#3a97d0", "#7d1d3f")
VARIABLES = {  # color -> CSS variable; page.css gives the dark ones
    INK: "--ink",
    MUTED: "--muted",
    SURFACE: "--surface",
    FULL: "--full",
    str(plot.STYLE["grid.color"]): "--grid",
    **{color: f"--series-{index}" for index, color in enumerate(SERIES)},
}
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX<>ph"  # as many as share no factor with SERIES
WIDTH = 4.9  # inches: on a phone text keeps 9 pixels, on a desktop two figures stand side by side
DIRECT = 4  # curves that are labelled at their ends; more get a legend


class Look(NamedTuple):
    color: str
    linestyle: Any
    marker: str


class Plot(NamedTuple):
    """A drawn figure, and what stands below it."""

    title: str
    caption: str
    figure: Figure

    @property
    def slug(self) -> str:
        """Of the title, for names of files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-.")[:100]


def drawing() -> AbstractContextManager[None]:
    """The settings under which figures are made and saved."""
    settings = {
        **plot.STYLE,
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "figure.titlesize": 10,
        "figure.titleweight": "bold",
        "legend.fontsize": 8.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.facecolor": SURFACE,
        "figure.facecolor": SURFACE,
        "lines.markersize": 4.5,
        "lines.linewidth": 1.5,
        "text.parse_math": False,  # a name with $ is a name
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "paged_kv",  # the same rows give the same page
    }
    return matplotlib.rc_context(settings)


def looks(labels: Sequence[str], full: Sequence[str] = ()) -> dict[str, Look]:
    """For each label in order; those in `full` are gray and dashed."""
    others = [label for label in labels if label not in full]
    found = {label: Look(FULL, "--", MARKERS[0]) for label in full}
    for index, label in enumerate(others):
        line = LINES[index // len(SERIES) % len(LINES)]
        found[label] = Look(SERIES[index % len(SERIES)], line, MARKERS[index % len(MARKERS)])
    return found


def png(plot_: Plot) -> bytes:
    file = io.BytesIO()
    plot_.figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def svg(plot_: Plot, prefix: str) -> str:
    """An <svg> for a page: ids begin with `prefix`, colors are variables, nothing is loaded."""
    file = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    plot_.figure.savefig(file, format="svg", metadata=empty)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), prefix), text)  # names stay as they are
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{rest}'


def _tag(tag: str, prefix: str) -> str:
    tag = re.sub(r' xmlns(:xlink)?="[^"]*"', "", tag).replace("xlink:href=", "href=")
    tag = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r"font: ([\w ]*?)([\d.]+px) [^;\"]*", _font, tag)
    return re.sub(r"#[0-9a-f]{6}\b", _variable, tag)


def _font(match: re.Match[str]) -> str:
    """The size and weight; the family is the page's."""
    weight = "; font-weight: 600" if "bold" in match.group(1) or "700" in match.group(1) else ""
    return f"font-size: {match.group(2)}{weight}"


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match.group())
    return f"var({name})" if name else match.group()
