"""From how many tokens on each request of a batch is held to its budget.

That is its prompt's end, or with start=pressure where pages ran out. A request that is sent back
and computed again keeps its start: only so does each token see again what it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paged_kv.core.schedule import NEVER
from paged_kv.hf.batch.page_counts import PageCounts


class Starts:
    """The starts of all requests; chooses who shrinks.

    Args:
        page_counts: counts the pages of all requests.
        prompt_lens: tokens of each request's prompt.
        waits: whether nothing is dropped while there are pages.
    """

    def __init__(
        self, page_counts: PageCounts, prompt_lens: Mapping[str, int], waits: bool
    ) -> None:
        self._page_counts, self._prompt_lens, self._waits = page_counts, prompt_lens, waits
        self._shrunk: dict[str, int] = {}
        self._running: dict[str, tuple[int, int]] = {}  # tokens before and after the next step
        self.fresh: set[str] = set()  # have shrunk since the last step

    def of(self, request: str) -> int:
        """Tokens from which a request is held to its budget; NEVER if that is not known."""
        return self._shrunk.get(request, NEVER) if self._waits else self._prompt_lens[request]

    def note(self, request: str, num_tokens: int) -> None:
        """A request is past its prompt, and has so many tokens."""
        self._running[request] = num_tokens, num_tokens

    def plan(self, request: str, num_new: int) -> None:
        """A request is going to have so many tokens more."""
        if request in self._running:
            before, _ = self._running[request]
            self._running[request] = before, before + num_new

    def forget(self, request: str) -> None:
        """A request does not run any more."""
        self._running.pop(request, None)

    def make_room(self, request: str | None, lack: Callable[[], float]) -> None:
        """Requests past their prompts shrink, those of the largest surplus first.

        Args:
            request: for whom; for one that does not run, or None, only if that is enough.
            lack: how many pages are missing; asked again after each that has shrunk.
        """
        if not self._waits or lack() <= 0:
            return
        counts = self._page_counts
        found = {
            name: counts.surplus(steps[0])
            for name, steps in self._running.items()
            if self.of(name) == NEVER and counts.surplus(steps[0]) > 0
        }
        if request not in self._running and sum(map(self._freed, found)) < lack():
            return
        for name in sorted(found, key=lambda each: -found[each]):  # of equal ones the oldest
            if lack() <= 0:
                return
            before, after = self._running[name]
            self._shrunk[name] = before
            self.fresh.add(name)
            counts.taken[name] = counts.during(before, after, before)

    def _freed(self, request: str) -> int:
        """Pages that a request would have less of in the next step."""
        before, after = self._running[request]
        counts = self._page_counts
        return counts.during(before, after, NEVER) - counts.during(before, after, before)
