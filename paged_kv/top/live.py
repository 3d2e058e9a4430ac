"""The view that stays: drawn after each scrape, in the terminal's other screen, until a key ends
it."""

from __future__ import annotations

import os
import queue
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from paged_kv.top.scrape import Scrape
from paged_kv.top.server import Server, Unanswered
from paged_kv.top.view import View
from paged_kv.top.window import Window

NO_VLLM = "no metrics of vLLM here: another server, or one with --disable-log-stats"
_CHARACTERS = 6  # of what tcgetattr gives: those with a meaning
Answer = Scrape | BaseException


def show(server: Server, window: Window, interval: float, console: Console) -> None:
    """Until q or Ctrl-C; the terminal is as it was afterwards."""
    asking = _Asking(server, interval)
    view = View(server.url, window, f"waiting for {server.url}", live=True)
    try:
        with (
            _keys(sys.stdin.fileno()),
            Live(view, console=console, screen=True, auto_refresh=False) as live,
        ):
            live.refresh()
            asking.start()
            while True:
                ready, _, _ = select.select([sys.stdin, asking.wakes], [], [])
                if sys.stdin in ready and _ends(os.read(sys.stdin.fileno(), 1024)):
                    return
                if asking.wakes in ready:
                    problem = take(asking.take(), window)
                    live.update(View(server.url, window, problem, live=True), refresh=True)
    except KeyboardInterrupt:
        return


def take(answer: Answer, window: Window) -> str:
    """Adds a scrape to what is known. Returns what is wrong with the answer, "" if nothing is."""
    if isinstance(answer, Unanswered):
        return str(answer)
    if isinstance(answer, BaseException):
        raise answer
    if not answer.is_vllm:
        return NO_VLLM
    window.add(answer)
    return ""


def _ends(keys: bytes) -> bool:
    return not keys or b"q" in keys.lower()  # none: the terminal is gone


class _Asking(threading.Thread):
    """Scrapes, while others wait for keys: a server may take its time."""

    def __init__(self, server: Server, interval: float) -> None:
        super().__init__(daemon=True)  # an answer that nobody waits for any more
        self._server, self._interval = server, interval
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.wakes, self._wake = os.pipe()

    def run(self) -> None:
        """As long as the process lives."""
        while True:
            began = time.monotonic()
            answer: Answer
            try:
                answer = self._server.scrape()
            except BaseException as error:  # for who takes it
                answer = error
            self._answers.put(answer)
            os.write(self._wake, b".")
            time.sleep(max(began + self._interval - time.monotonic(), 0.0))

    def take(self) -> Answer:
        """The next answer; `wakes` is readable when there is one."""
        os.read(self.wakes, 1)
        return self._answers.get()


@contextmanager
def _keys(terminal: int) -> Iterator[None]:
    """Keys come one by one and are not shown. Who terminates us finds the terminal as it was."""
    before = termios.tcgetattr(terminal)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        tty.setcbreak(terminal)
        changed = termios.tcgetattr(terminal)
        changed[_CHARACTERS][termios.VSUSP] = (
            b"\0"  # Ctrl-Z would leave a screen that is not its own
        )
        termios.tcsetattr(terminal, termios.TCSADRAIN, changed)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, handler)
