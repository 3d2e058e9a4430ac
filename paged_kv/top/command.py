"""`paged-kv top URL`: a running server, in the terminal, from its /metrics.

URL is the server's (http://127.0.0.1:8000) or its metrics' (.../metrics). Rates are means over the
last ten seconds, or over one interval if that is longer. q or Ctrl-C ends it.

pool           pages that requests hold, and free ones
bytes          in use: of pages, of swapped pages, of spilled entries, by tier
pressure       requests that shrank to their budgets, and steps in which that spared a preemption
compactions    of one rank, the slowest if there are several: how long, which share of the time
given back     pages that compactions have freed, by layer group
evicted        entries that were dropped, or merged, per KV head, in all layers of the group
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TextIO

from rich.console import Console

from paged_kv.top import live
from paged_kv.top.server import Server, Unanswered
from paged_kv.top.view import View
from paged_kv.top.window import Window

LEAST, MOST = 0.1, 3600.0  # seconds of an interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv top`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("url", metavar="URL", help="of the server, or of its /metrics")
    add("--interval", type=float, default=1.0, metavar="SECONDS", help="from one look to the next "
        "(default 1)")  # fmt: skip
    add("--once", action="store_true", help="print one view as text and end; it takes two looks, "
        "for rates")  # fmt: skip
    add("--engine", type=int, metavar="N", help="one of several engines (default: all together)")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="send it with each "
        "request, such as 'Authorization: Bearer ...'; repeat it for more")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Shows the server. Raises ValueError: an option cannot be."""
    server = Server(args.url, args.header)
    if not LEAST <= args.interval <= MOST:
        raise ValueError(f"--interval must be {LEAST:g} to {MOST:g} seconds, not {args.interval:g}")
    window = Window(None if args.engine is None else str(args.engine))
    if args.once:
        return _once(server, window, args.interval)
    console = _console(sys.stdout)
    if not (sys.stdin.isatty() and console.is_terminal) or console.is_dumb_terminal:
        raise ValueError("top needs a terminal for its input and output: use --once without one")
    live.show(server, window, args.interval, console)
    return 0


def _once(server: Server, window: Window, interval: float) -> int:
    try:
        problem = live.take(server.scrape(), window)
        if not problem:
            time.sleep(interval)
            problem = live.take(server.scrape(), window)
    except Unanswered as error:
        problem = str(error)
    if problem:
        print(f"paged-kv: error: {problem}", file=sys.stderr)
        return 1
    console = _console(sys.stdout, color=False)
    with console.capture() as drawn:
        console.print(View(server.url, window))
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
    return 0


def _console(file: TextIO, color: bool = True) -> Console:
    """Where names are text, whatever they look like."""
    reconfigure = getattr(file, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal without the bars' characters
    return Console(
        file=file,
        color_system="auto" if color else None,
        force_terminal=None if color else False,
        markup=False,
        emoji=False,
        highlight=False,
    )
