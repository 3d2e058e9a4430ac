"""Who shrinks to its budget when pages run out, before vLLM would preempt anybody.

A request whose start the scheduler sets to n tokens gives its surplus back when the step that
reaches n has been processed. So this looks ahead, before each step:

    step      k         k + 1       ...     k + lead - 1        then, when it is processed
    | start := n + lead | the policy looks  | compacts |        pages are free

The pages that running requests need in the steps up to there must be free, or on their way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from vllm.v1.request import Request, RequestStatus

from paged_kv.core.schedule import NEVER, cdiv
from paged_kv.vllm.scheduler.choice import Candidate, choose
from paged_kv.vllm.scheduler.shrinking import ShrinkingManager


class _Coming(NamedTuple):
    """Pages that a request gives back when it has processed so many tokens."""

    start: int
    num_pages: int


class Pressure:
    """The starts of one scheduler's requests.

    Args:
        managers: of all layer groups; those of compressed layers are ShrinkingManagers.
        num_batches: steps that are in flight at once, at most.
        max_len: tokens of the longest sequence.
        longest: tokens that a sequence may hold whole for sure; None: any number.
        by_priority: whether requests of lower priority shrink first.
        num_layers: of each layer group.
    """

    def __init__(
        self,
        managers: Sequence[Any],
        num_batches: int,
        max_len: int,
        longest: int | None,
        by_priority: bool,
        num_layers: Sequence[int],
    ) -> None:
        self.managers = managers
        self.paged = [m for m in managers if isinstance(m, ShrinkingManager)]
        self.pool = managers[0].block_pool
        self.page_size = self.paged[0].block_size
        self.lead = max(manager.lead for manager in self.paged)
        self.horizon = self.lead + num_batches  # steps, the last of which a shrinking can serve
        self.max_len, self.longest, self.by_priority = max_len, longest, by_priority
        self.pages_each = len(managers) * (self.horizon // self.page_size + 1)  # in these steps
        self.num_awaited = 0  # pages that waiting requests shall get
        self.counts: Counter[str] = Counter()  # requests, entries, preemptions that were avoided
        self._num_layers = num_layers
        self._starts: dict[str, int] = {}  # that the workers have not been told
        self._coming: dict[str, _Coming] = {}

    def first_start(self, prompt_len: int) -> int:
        """The start of a request that arrives: NEVER, but where a prompt nearly fills the pool."""
        if self.longest is not None and prompt_len + self.horizon > self.longest:
            return prompt_len
        return NEVER

    def tell(self, request_id: str, start: int) -> None:
        """The workers shall know a request's start."""
        self._starts[request_id] = start

    def drain(self) -> dict[str, int]:
        """What the workers have to be told in the step that has just been scheduled."""
        starts, self._starts = self._starts, {}
        return starts

    def forget(self, request_id: str) -> None:
        """A request has lost its pages."""
        self._coming.pop(request_id, None)

    def end(self, request_id: str) -> None:
        """A request is over: workers that were not told of it forget no name that comes later."""
        self.forget(request_id)
        self._starts.pop(request_id, None)

    def relieve(
        self, running: Sequence[Request], waiting: Iterator[int], requests: Mapping[str, Request]
    ) -> None:
        """Before a step is scheduled: sets starts, if pages will be short.

        Args:
            running: requests, in the order in which vLLM serves them.
            waiting: pages that requests need to be admitted, in order; those are asked for only
                if the others can give them.
            requests: all, by name.
        """
        self._take_back(requests)
        self._force(running)
        free, awaited = self.pool.get_num_free_blocks(), [*islice(waiting, 1)]
        if not awaited and self._most_needed(running) <= free:
            self.num_awaited = 0
            return  # enough, in any case
        coming = sum(coming.num_pages for coming in self._coming.values())
        growth = self.reserved(running) - free - coming
        short, candidates, most = growth, None, 0
        for pages in chain(awaited, waiting):
            if short + pages > 0 and candidates is None:
                candidates = self._candidates(running)
                most = sum(candidate.surplus for candidate in candidates)
            if short + pages > most:
                break
            short += pages
        self.num_awaited = short - growth
        if short > 0:
            chosen = self._candidates(running) if candidates is None else candidates
            num_shrunk = self._shrink(running, chosen, short)
            self.counts["avoided_preemptions"] += growth > 0 and num_shrunk > 0

    def reserved(self, running: Sequence[Request]) -> int:
        """Pages that running requests need in the next steps, more than they hold.

        And those for copies, so that whoever shares a prefix can shrink.
        """
        growth = sum(self._growth(request, self.horizon) for request in running)
        return growth + self._num_to_copy(running)

    def _num_to_copy(self, running: Sequence[Request]) -> int:
        names = [request.request_id for request in running]
        return sum(manager.num_to_copy(names) for manager in self.paged)

    def num_held(self, running: Sequence[Request]) -> int:
        """Running requests that are held to their budgets."""
        return sum(self.paged[0].start(r.request_id) <= r.num_computed_tokens for r in running)

    def is_coming(self, requests: Mapping[str, Request]) -> bool:
        """Whether steps in flight will give pages back."""
        return any(
            requests[name].num_computed_tokens >= coming.start
            for name, coming in self._coming.items()
            if name in requests
        )

    def _most_needed(self, running: Sequence[Request]) -> int:
        """No fewer than reserved(running), at once."""
        prompts = sum(
            cdiv(request.num_tokens, self.page_size)
            for request in running
            if request.num_computed_tokens < request.num_tokens - 1
        )
        growth = len(self.managers) * prompts + self.pages_each * len(running)
        return growth + self._num_to_copy(running)

    def _growth(self, request: Request, num_steps: int) -> int:
        """Pages that a request needs in its next steps; of a prompt that has begun, for all of it.

        One that is at its budget gives a page back for each that it takes.
        """
        name, computed = request.request_id, request.num_computed_tokens
        end = min(max(computed, request.num_tokens - 1) + num_steps, self._end(request))
        total = 0
        for manager in self.managers:
            pages = cdiv(end, self.page_size) - len(manager.req_to_blocks.get(name, ()))
            is_held = isinstance(manager, ShrinkingManager) and manager.start(name) <= computed
            total += max(0, min(pages, 1) if is_held else pages)
        return total

    def _end(self, request: Request) -> int:
        """Tokens that a request has at its end, at most."""
        return min(request.num_prompt_tokens + request.max_tokens, self.max_len)

    def _take_back(self, requests: Mapping[str, Request]) -> None:
        """Pages that steps which have been processed have emptied are free now."""
        for name, coming in list(self._coming.items()):
            request = requests[name]
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            if processed >= coming.start:
                for manager in self.paged:
                    manager.remove_skipped_blocks(name, processed)
                del self._coming[name]

    def _candidate(self, request: Request) -> Candidate | None:
        """The request, if it can shrink: past its prompt, above its budget, not about to end."""
        computed = request.num_computed_tokens
        start = computed + self.lead
        if computed < request.num_prompt_tokens or start >= self._end(request):
            return None
        if self.paged[0].start(request.request_id) != NEVER:
            return None
        surplus = sum(m.schedule.evicted(start, start) // self.page_size for m in self.paged)
        return Candidate(request, start, surplus) if surplus else None

    def _candidates(self, running: Sequence[Request]) -> list[Candidate]:
        """Who can shrink, in the order in which it is asked for: the largest surplus first."""
        found = [each for each in map(self._candidate, running) if each is not None]

        def key(candidate: Candidate) -> tuple[float, ...]:
            request = candidate.request
            priority = -request.priority if self.by_priority else 0
            return priority, -candidate.surplus, request.arrival_time

        return sorted(found, key=key)

    def _force(self, running: Sequence[Request]) -> None:
        """What could not be computed again when it has been preempted shrinks in time."""
        if self.longest is None:
            return
        for request in running:
            if request.num_computed_tokens + self.horizon > self.longest:
                candidate = self._candidate(request)
                if candidate is not None:
                    self._start(candidate, 0)

    def _shrink(
        self, running: Sequence[Request], candidates: Sequence[Candidate], short: int
    ) -> int:
        """Starts requests until so many pages are coming; returns how many."""
        # Copies are made now, pages come back when all but the last of these steps are scheduled.
        meanwhile = sum(self._growth(request, self.horizon - 1) for request in running)
        spare = self.pool.get_num_free_blocks() - meanwhile
        chosen = choose(self.paged, candidates, short, max(0, spare))
        for candidate, num_pages in chosen:
            self._start(candidate, num_pages)
        return len(chosen)

    def _start(self, candidate: Candidate, num_pages: int) -> None:
        request, start = candidate.request, candidate.start
        assert request.status == RequestStatus.RUNNING
        for manager in self.paged:
            manager.shrink_from(request.request_id, start)
        self.tell(request.request_id, start)
        self._coming[request.request_id] = _Coming(start, num_pages)
        self.counts["shrunk_requests"] += 1
        self.counts["shrunk_entries"] += sum(
            manager.schedule.evicted(start, start) * self._num_layers[manager.kv_cache_group_id]
            for manager in self.paged
        )
