"""Pages of the requests of a batch, counted before they are taken: who may run in the next step.

Counts depend on the lengths alone (paged_kv.core.schedule), so they are known ahead:

    held by a request        after a step:  n - evicted(n, start)        entries of each layer
    needed for its next step while it runs: n + new - evicted(n, start)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from paged_kv.core.schedule import NEVER, Schedule, cdiv
from paged_kv.hf.allocator import PoolFull


class PageCounts:
    """Pages that requests hold or will hold at the end of the next step.

    Args:
        schedules: of the layers that have pages; None for one that keeps everything.
        page_size: entries per page.
        num_pages: most pages that may be held at once; None: any number.
        chunk: most tokens of a prompt that are computed at once.
        has_residual: whether a step ends where a page does. All queries of a step read the same
            native pages, so a longer step would see fewer of them than decoding did.
        waits: with start=pressure: what is computed again comes in steps that may be longer than
            the prompt.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule | None],
        page_size: int,
        num_pages: int | None,
        chunk: int,
        has_residual: bool = False,
        waits: bool = False,
    ) -> None:
        self._layers, self._has_residual = Counter(schedules), has_residual
        self._waits = waits
        self._page_size, self._chunk = page_size, chunk
        self.num_pages = num_pages
        self.taken: dict[str, int] = {}

    @property
    def num_free(self) -> float:
        """Pages that nobody has taken; infinite without a limit."""
        return float("inf") if self.num_pages is None else self.num_pages - sum(self.taken.values())

    @property
    def free_share(self) -> float:
        """Of all pages."""
        return 1.0 if self.num_pages is None else self.num_free / self.num_pages

    def during(self, before: int, after: int, start: int) -> int:
        """Pages of a sequence in the step that takes it from `before` to `after` tokens.

        Between steps the two are the same.
        """
        total = 0
        for schedule, count in self._layers.items():
            dropped = schedule.evicted(before, start) if schedule else 0
            total += count * cdiv(after - dropped, self._page_size)
        return total

    def surplus(self, num_tokens: int) -> int:
        """Entries that a sequence drops, in all layers, if it is held to its budget from now on."""
        return sum(
            count * (schedule.evicted(num_tokens, num_tokens) - schedule.evicted(num_tokens, NEVER))
            for schedule, count in self._layers.items()
            if schedule is not None
        )

    def peak(self, num_tokens: int, start: int) -> int:
        """Most pages of a sequence on its way to so many tokens."""
        total = 0
        for schedule, count in self._layers.items():
            entries = num_tokens
            if schedule is not None:
                longest = min(self._chunk, num_tokens if self._waits else start)
                chunk = longest if schedule.compress_prefill else 1
                entries = schedule.max_retained(num_tokens, start, chunk)
            total += count * cdiv(entries, self._page_size)
        return total

    def longest_step(self, num_tokens: int, start: int) -> int:
        """Most tokens that may follow at once and see what they would see one by one.

        What is computed again must see what it saw: a step ends at the start, and from there on
        where something is dropped.
        """
        most = self._chunk
        if self._has_residual:
            most = min(most, self._page_size - num_tokens % self._page_size)
        if num_tokens < start:
            return min(most, start - num_tokens)
        limits = [
            _first_eviction(schedule, num_tokens, start, self._chunk)
            for schedule in self._layers
            if schedule is not None
        ]
        return min([*limits, most])

    def take(self, request: str, num_pages: int) -> bool:
        """Whether there is room for a request to have so many pages; then it has them."""
        if num_pages - self.taken.get(request, 0) > self.num_free:
            return False
        self.taken[request] = num_pages
        return True

    def give_back(self, request: str) -> None:
        """A request has no pages any more."""
        self.taken.pop(request, None)

    def enough(self, lengths: Sequence[tuple[int, int]], max_requests: int) -> int:
        """Pages that so many requests at once never exceed.

        Args:
            lengths: of each request, its tokens at its end and its start.
            max_requests: at once.
        """
        peaks = sorted((self.peak(*length) for length in lengths), reverse=True)
        return sum(peaks[:max_requests])

    def check(self, index: int, num_tokens: int, prompt_len: int) -> None:
        """Refuses a prompt that could not even run alone.

        Args:
            index: of the prompt.
            num_tokens: tokens at its end.
            prompt_len: those of the prompt.

        Raises:
            PoolFull: it needs more than all pages.
        """
        needed = self.peak(num_tokens, prompt_len)
        if self.num_pages is not None and needed > self.num_pages:
            raise PoolFull(
                f"num_pages {self.num_pages} is too small: prompt {index} ({prompt_len} tokens, "
                f"{num_tokens - prompt_len + 1} new ones) needs {needed} pages of "
                f"{self._page_size} entries: raise num_pages, or lower the budget or max_new_tokens"
            )


def _first_eviction(schedule: Schedule, num_tokens: int, start: int, limit: int) -> int:
    """Tokens until more is dropped than now; at most `limit`."""
    after = num_tokens + np.arange(1, limit + 1)
    more = schedule.evicted(after, start) > schedule.evicted(num_tokens, start)
    return int(more.argmax()) + 1 if more.any() else limit
