"""The HTML page: template, style and script in one file that loads nothing and sets nothing."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from paged_kv.report import rows as reading
from paged_kv.report import style, tables
from paged_kv.report.rows import Group, Replaced
from paged_kv.report.style import Plot
from paged_kv.report.summary import Summary
from paged_kv.results import Row

HERE = Path(__file__).parent
STYLES = (HERE.parent / "looks.css", HERE / "page.css")


class Section(NamedTuple):
    """Plots under a heading."""

    id: str  # also how the ids of its drawings begin
    title: str
    text: str
    plots: Sequence[Plot]
    folded: Mapping[str, Sequence[Plot]] = {}  # title -> more of them, which a reader may open

    @property
    def all_plots(self) -> list[Plot]:
        return [*self.plots, *(plot for plots in self.folded.values() for plot in plots)]


def render(
    groups: Sequence[Group],
    summaries: Sequence[tuple[Summary, Plot | None]],
    sections: Sequence[Section],
    replaced: Sequence[Replaced],
) -> str:
    """The page. Names from rows are escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = [row for group in groups for row in group.rows]
    models = sorted({str(row.get("model") or "unknown model") for row in rows})
    return environment.get_template("page.html").render(
        title=f"KV-cache compression: {', '.join(models)}",
        css=Markup("".join(path.read_text(encoding="utf-8") for path in STYLES)),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        runs=_runs(rows),
        commands=sorted({str(row["command"]) for row in rows if row.get("command")}),
        replaced=[_replaced_text(each) for each in replaced],
        summaries=[_summary(summary, plot, n) for n, (summary, plot) in enumerate(summaries)],
        sections=[_section(section) for section in sections if section.all_plots],
        tables=tables.of_tasks(groups),
    )


def _runs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What ran where: one for each model, device and set of versions."""
    found = defaultdict(list)
    for row in rows:
        names = ("model", "model_hash", "device", "versions")
        found[json.dumps([row.get(name) for name in names])].append(row)
    runs = []
    for members in found.values():
        first = members[0]
        dates = sorted({str(row["date"]) for row in members if row.get("date")})
        versions = first.get("versions") or {}
        listed = ", ".join(f"{name} {number}" for name, number in versions.items())
        runs.append(
            {
                **{name: first.get(name) or "unknown" for name in ("model", "model_hash")},
                "device": first.get("device") or "unknown",
                "versions": listed or "unknown",
                "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "unknown",
                "rows": len(members),
            }
        )
    return runs


def _replaced_text(replaced: Replaced) -> str:
    row, by = replaced
    budget = reading.budget_text(row["budget"]) or "all"
    what = f"{row['task']} ({row['metric']}), {row['policy']}, budget {budget}"
    text = f"{what}: {row['score']} of {row.get('date') or 'no date'}, now {by['score']}"
    if row.get("command") != by.get("command"):
        text += f"; the earlier row was made by: {row.get('command')}"
    return text


def _summary(summary: Summary, plot: Plot | None, index: int) -> dict[str, Any]:
    return {
        **summary._asdict(),
        "means": tables.of_summary(summary),
        "shares": tables.of_shares(summary),
        "plot": _figure(plot, f"summary{index}") if plot else None,
    }


def _section(section: Section) -> dict[str, Any]:
    numbers = itertools.count()

    def figures(plots: Sequence[Plot]) -> list[Markup]:
        return [_figure(plot, f"{section.id}{next(numbers)}") for plot in plots]

    folded = {title: figures(plots) for title, plots in section.folded.items()}
    return {**section._asdict(), "plots": figures(section.plots), "folded": folded}


def _figure(plot: Plot, prefix: str) -> Markup:
    drawing = Markup(style.svg(plot, prefix))
    return Markup(
        '<figure><div role="img" aria-label="{}">{}</div><figcaption>{}</figcaption></figure>'
    ).format(escape(plot.title), drawing, escape(plot.caption))
