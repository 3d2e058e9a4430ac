"""What shrinking under pressure has come to, in vLLM's log from time to time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from vllm import envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class PressureLog:
    """A line at most as often as vLLM's own, and only if somebody has shrunk since the last one.

    Args:
        counts: of Pressure; totals.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts
        self._logged: Counter[str] = Counter()
        self._due = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether there is something to say, and time for it."""
        return self._counts != self._logged and time.monotonic() >= self._due

    def write(self, num_held: int, num_running: int) -> None:
        """Logs what is new.

        Args:
            num_held: running requests that are held to their budgets.
            num_running: all of them.
        """
        new = Counter(self._counts) - self._logged
        self._logged = Counter(self._counts)
        self._due = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL
        logger.info(
            "paged_kv under pressure: %d requests shrank to their budgets and dropped %s entries "
            "(per KV head, all layers), in %d steps because running requests would have run out of "
            "pages, else to admit others. Now %d of %d running requests are held to their budgets",
            new["shrunk_requests"],
            f"{new['shrunk_entries']:,}",
            new["avoided_preemptions"],
            num_held,
            num_running,
        )
