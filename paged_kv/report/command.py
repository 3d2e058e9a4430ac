"""`paged-kv report`: result rows as one HTML page, with plots and tables, and as PNG files.

RESULTS are files of result rows, as `paged-kv eval` and `paged-kv bench` write them. The page needs
no network and no other file. A claim that stands in the files twice counts once, as it was measured
last; the page says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from paged_kv import results
from paged_kv.report import page, quality, speed, style
from paged_kv.report import rows as reading
from paged_kv.report.checks import check
from paged_kv.report.rows import Group
from paged_kv.report.sections import make_sections
from paged_kv.report.style import Look, Plot
from paged_kv.report.summary import summaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv report`."""
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS", help="files of result rows")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE",
        help="the page (default report.html)")  # fmt: skip
    add("--png", type=Path, metavar="DIR", help="write each plot as a PNG there, too")


def main(args: argparse.Namespace) -> None:
    """Writes and says where. Raises ValueError for what the user got wrong."""
    rows = results.read(args.results)
    check(rows)
    check_out(args.out, args.results)
    kept, replaced = reading.latest(rows)
    with style.drawing():
        groups = reading.groups(reading.named(kept))
        looks = _looks(groups)
        tops = [(summary, quality.means(summary, looks)) for summary in summaries(groups)]
        sections = make_sections(groups, looks)
        text = page.render(groups, tops, sections, replaced)
        plots = [plot for _, plot in tops if plot]
        plots += [plot for section in sections for plot in section.all_plots]
        if args.png is not None:
            write_pngs(args.png, plots)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: rows {len(kept)}, measured again {len(replaced)}, plots {len(plots)}")


def _looks(groups: Sequence[Group]) -> dict[str, Look]:
    rows = [row for group in groups for row in group.rows]
    full = {row["label"] for row in rows if reading.is_full(row) or speed.is_plain(row)}
    return style.looks(reading.labels(rows), sorted(full))


def write_pngs(directory: Path, plots: Sequence[Plot]) -> None:
    """A file for each plot, named after its title. Raises ValueError if they cannot be written."""
    names: set[str] = set()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            name, number = plot.slug, 2
            while name in names:
                name, number = f"{plot.slug}-{number}", number + 1
            names.add(name)
            (directory / f"{name}.png").write_bytes(style.png(plot))
    except OSError as error:
        raise ValueError(f"png {directory}: {error}") from None


def check_out(path: Path, results_: Sequence[Path]) -> None:
    """Raises ValueError, before drawing, unless the page can be written; makes folders."""
    if path.resolve() in [each.resolve() for each in results_]:
        raise ValueError(f"out {path}: is one of the results, which it would replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(f"out {path}: {error}") from None
