"""The view of a server: it fits 80 x 24, and grows with the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from paged_kv.top.facts import Facts, Table, engines, facts, groups, models, policies
from paged_kv.top.scrape import ours
from paged_kv.top.window import Window
from paged_kv.top.words import count, flow, percent, plain, rate, spark

LABEL = 14  # columns of the word that a line begins with
FULL, FREE = "█", "░"
SCARCE = 0.1  # of the pool: what is free is red below
LEAST, MANY = 3, 10**6  # lines of a table, with its head
KEYS = "q ends"
NO_POLICY = "no metrics of paged_kv: a server without --kv-policy (else its log says why)"


class View:
    """What rich draws.

    Args:
        url: of the metrics.
        window: what is known.
        problem: why there is nothing newer; "" if there is.
        live: with curves and keys, and as many rows of tables as the terminal has room for; else
            all rows.
    """

    def __init__(self, url: str, window: Window, problem: str = "", live: bool = False) -> None:
        self._url, self._window, self._problem, self._live = url, window, problem, live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = list(self._lines(width))
        if self._live:
            lines += _curves(self._window, width)
        yield from lines
        if not self._window.last.has_policy:
            return
        room = options.max_height - len(lines) if self._live else MANY
        for table, reserved in ((engines(self._window), LEAST), (groups(self._window), 0)):
            if table.rows and room - reserved >= LEAST:
                shown = _shorten(table, room - reserved - 1)
                yield _rich(shown)
                room -= len(shown.rows) + 1

    def _lines(self, width: int) -> Iterator[Text]:
        window = self._window
        names = [name for name in (models(window), policies(window)) if name]
        yield _line("  ".join(["paged-kv top", *names]), "bold")
        yield _line(self._source(), "dim")
        if self._problem:
            yield _line(self._problem, "bold red")
        if not window.last.is_vllm:
            return
        if not window.last.has_policy:
            yield _line(NO_POLICY, "bold yellow")
        yield from _pool(window, width)
        for fact in facts(window):
            yield from _fact(fact, width)

    def _source(self) -> str:
        window, parts = self._window, [plain(self._url)]
        if window.seconds:
            digits = 0 if window.seconds >= 1 else 1
            parts.append(f"rates of the last {window.seconds:.{digits}f} s")
        if window.restarted:
            parts.append(f"restarted before {window.restarted}")
        return "   ".join([*parts, KEYS] if self._live else parts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _labelled(word: str, text: str, style: str = "") -> Text:
    line = _line(f"{word:{LABEL}}", "cyan")
    return line.append(text, style or "default")


def _fact(fact: Facts, width: int) -> Iterator[Text]:
    word, items = fact
    for line in flow(items, width - LABEL):
        yield _labelled(word, line)
        word = ""


def _pool(window: Window, width: int) -> Iterator[Text]:
    pool, free = (window.last.total(ours(name)) for name in ("pool_pages", "free_pages"))
    if not pool or free is None:
        return
    held = min(max(pool - free, 0.0), pool)
    numbers = f"  {count(held)} of {count(pool)} pages held, {count(free)} free"
    numbers += f" ({percent(free, pool)})"
    bar = max(width - LABEL - len(numbers), 4)
    taken = round(held / pool * bar)
    line = _labelled("pool", FULL * taken, "red" if free < SCARCE * pool else "green")
    yield line.append(FREE * (bar - taken), "dim").append(numbers, "default")


def _curves(window: Window, width: int) -> Iterator[Text]:
    """Sparklines from zero to their highest points, which they name."""
    if not window.last.is_vllm:
        return
    curves: list[tuple[str, Sequence[float], str]] = [("output/s", window.tokens, "green")]
    if window.last.has_policy:
        curves.append(("free pages", window.free, "blue"))
    for word, points, style in curves:
        if len(points) > 1:
            show = rate if points is window.tokens else count
            highest = f"  highest {show(max(points))}"
            bars = spark(list(points), max(width - LABEL - len(highest), 4))
            yield _labelled(word, bars, style).append(highest, "default")


def _shorten(table: Table, rows: int) -> Table:
    """The first rows; a last one says how many there is no room for."""
    if len(table.rows) <= rows:
        return table
    left = len(table.rows) - rows + 1
    more = [f"+{left}", "more", *[""] * (len(table.columns) - 2)]
    return table._replace(rows=[*table.rows[: rows - 1], more])


def _rich(table: Table) -> RichTable:
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="cyan")
    for number, column in enumerate(table.columns):
        head = Text(column)
        if number < table.names:
            drawn.add_column(head, no_wrap=True, overflow="ellipsis")
        else:
            drawn.add_column(head, justify="right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
