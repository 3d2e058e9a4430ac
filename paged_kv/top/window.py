"""The scrapes of the last seconds, and how fast counters grow in them."""

from __future__ import annotations

import time
from collections import deque

from paged_kv.top.scrape import Scrape, ours

SPAN = 10.0  # seconds that rates are means over, or one interval if that is longer
POINTS = 1000  # what curves show at most
TOKENS_IN, TOKENS_OUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"


class Window:
    """What is known of a server.

    Args:
        engine: one of several, by vLLM's number; None for all.

    Attributes:
        last: the newest scrape.
        tokens: output tokens per second, from scrape to scrape.
        free: free pages at each scrape.
        restarted: time of day when counters were smaller than before, "" if they never were.
    """

    def __init__(self, engine: str | None = None) -> None:
        self._engine = engine
        self._scrapes: deque[Scrape] = deque()
        self.last = Scrape(0.0, {})
        self.tokens: deque[float] = deque(maxlen=POINTS)
        self.free: deque[float] = deque(maxlen=POINTS)
        self.restarted = ""

    def add(self, scrape: Scrape) -> None:
        """A newer one. Raises ValueError: --engine names none of this server's engines."""
        engines = scrape.label("engine", *{series.name for series in scrape.values})
        if self._engine is not None and engines and self._engine not in engines:
            raise ValueError(f"--engine must be one of {', '.join(filter(None, engines))} here, "
                f"not {self._engine}")  # fmt: skip
        scrape = scrape.of_engine(self._engine)
        if any(_fell(before, scrape) for before in self._scrapes):
            self.restarted = time.strftime("%H:%M:%S")
            self._scrapes.clear()
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.time - self._scrapes[1].time >= SPAN:
            self._scrapes.popleft()
        if len(self._scrapes) > 1:
            self.tokens.append(_growth(self._scrapes[-2], scrape, TOKENS_OUT, {}) or 0.0)
        self.free.append(scrape.total(ours("free_pages")) or 0.0)
        self.last = scrape

    def rate(self, name: str, **labels: str) -> float | None:
        """How much counters with these labels grow per second, together.

        None: there are none, or they were seen once.
        """
        return _growth(self._scrapes[0], self.last, name, labels) if self._scrapes else None

    @property
    def seconds(self) -> float:
        """That rates are means over."""
        return self.last.time - self._scrapes[0].time if self._scrapes else 0.0


def _fell(before: Scrape, now: Scrape) -> bool:
    return any(
        series.is_counter and now.values.get(series, value) < value
        for series, value in before.values.items()
    )


def _growth(before: Scrape, now: Scrape, name: str, labels: dict[str, str]) -> float | None:
    found, seconds = now.find(name, **labels), now.time - before.time
    if not found or seconds <= 0:
        return None
    return sum(v - before.values.get(series, v) for series, v in found.items()) / seconds
