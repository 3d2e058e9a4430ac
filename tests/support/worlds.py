"""Worlds of integers: vLLM's real scheduler and page managers, a worker without a model.

The scheduler is the real one under a real VllmConfig; the model is a config.json. The worker does
what vLLM's V1 runner and our Compactor do with pages, but an entry is a label that says what was
computed: equal labels are equal keys and values. Beside the pages it keeps, for every request, the
cache that a private run without prefix caching would have, and compares what a step reads.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, make_block_hash_with_group_id
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from world_rules import Rules, capacities, make_scheduler
from world_swap import LabelCopier
from world_worker import Label, Scattering, Worker, label_of

from paged_kv.core.schedule import NEVER, cdiv
from paged_kv.policies.base import PositionalPolicy
from paged_kv.vllm.scheduler import limits
from paged_kv.vllm.swap.commands import Load


class World:
    """A scheduler, a worker, and the requests that were sent to them."""

    def __init__(self, rules: Rules, policy: PositionalPolicy | None = None, seed: int = 0) -> None:
        self.rules = rules
        self.scheduler = make_scheduler(rules)
        self.manager = self.scheduler.kv_cache_manager
        self.paged_managers = self.scheduler.paged_managers if rules.budgets else []
        self.ledger = self.scheduler.connector.ledger if rules.swap else None
        self.pool = self.manager.block_pool
        policy = policy or Scattering(0, 0)
        copier = LabelCopier(capacities(rules), random.Random(seed)) if rules.swap else None
        self.worker = Worker(rules.schedules, self.pool, rules.page_size, policy, copier)
        self.worker.waits_for_pressure = rules.pressure
        if rules.pressure:
            self._watch_preemptions()
        self.seen: Counter[str] = Counter()
        self.requests: dict[str, Request] = {}
        self.hits: dict[str, int] = {}
        self.restored: dict[str, int] = {}  # tokens that the swap gave back; 0: began anew
        self.num_steps = 0
        self.is_resetting = False
        self.chunks: dict[str, list[tuple[int, int]]] = {}
        self.outputs: dict[int, Any] = {}  # of the last step that was processed, by client
        self._hasher = get_request_block_hasher(rules.page_size, sha256)
        self._hashed: dict[Any, list[Label]] = {}
        self._num_noted: dict[str, int] = {}
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def add(
        self, prompt: list[int], max_tokens: int, name: str | None = None, priority: int = 0
    ) -> str:
        """Sends a request."""
        name = name or f"r{len(self.requests)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request(
            name, list(prompt), params, None, priority=priority, block_hasher=self._hasher
        )
        self.scheduler.add_request(request)
        self.requests[name] = request
        return name

    def abort(self, name: str) -> None:
        self.seen["swapped, then aborted"] += (
            self.ledger is not None and name in self.ledger.swapped
        )
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def reset(self, **kwargs: Any) -> None:
        """Preempts all that run; the output of steps in flight is thrown away."""
        self.worker.num_resets += 1
        self.is_resetting = True
        self.scheduler.reset_prefix_cache(reset_running_requests=True, **kwargs)
        self.is_resetting = False

    def step(self) -> None:
        """Schedules a step; under async scheduling before the output of the last is processed."""
        self.num_steps += 1
        hashed_before = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        waiting = {r.request_id for r in self.scheduler.waiting}
        processed = {
            name: request.num_computed_tokens - request.num_in_flight_tokens
            for name, request in self.scheduler.requests.items()
        }
        output = self.scheduler.schedule()
        if output.num_scheduled_tokens or self.ledger is not None:
            self._check_held(output, waiting, processed)
            self._in_flight.append((output, self.worker.execute(output, hashed_before)))
        self._check_pool()
        if self.ledger is not None:
            self._check_ledger()
        depth = 2 if self.rules.asynchronous else 1
        if len(self._in_flight) >= depth or not output.num_scheduled_tokens:
            self.process()

    def process(self) -> None:
        """Processes the output of the oldest step in flight."""
        if self._in_flight:
            self.outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
        if not self._in_flight:
            self._check_hashed()

    def drain(self) -> None:
        """Processes all outputs."""
        while self._in_flight:
            self.process()

    def run(self, max_steps: int) -> None:
        """Until nothing is left to do; fails if that takes more than max_steps."""
        for _ in range(max_steps):
            if not self.scheduler.requests:
                break
            self.step()
        self.drain()
        assert not self.scheduler.requests, f"not done after {max_steps} steps"

    def run_out(self) -> None:
        """A step for what was left to be said when the last request had ended."""
        self.step()
        self.drain()

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    def held(self, name: str) -> list[list[int]]:
        """Page ids that a request holds, by group."""
        blocks = (m.req_to_blocks.get(name, []) for m in self._managers)
        return [[b.block_id for b in group if not b.is_null] for group in blocks]

    def max_prompt_len(self) -> int | None:
        """Longest prompt that the pool holds; None: any that a request may have."""
        return limits.max_prompt_len(self.scheduler.vllm_config, self.rules.num_pages)

    def check_empty(self) -> None:
        """All pages are back, and nothing is remembered of requests that are gone."""
        assert self.num_free == self.rules.num_pages - 1
        for manager in self._managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
        if self.ledger is not None:
            assert not self.ledger.swapped
            assert self.ledger.used == (0, 0)
            assert not self.worker.copier.kept
        for manager in self.paged_managers:
            assert not manager._sequences
            assert not manager._restored
            assert not manager.cached_pages.to_be_written
            assert not manager.cached_pages.snapshots._in_flight

    def start(self, name: str) -> int:
        """Tokens from which a request is held to its budget."""
        start: int = self.paged_managers[0].start(name) if self.paged_managers else NEVER
        return start

    def can_shrink(self, request: Request) -> bool:
        """Whether a request is past its prompt, above its budget, and has all pages to itself."""
        rules, name, computed = self.rules, request.request_id, request.num_computed_tokens
        end = min(request.num_prompt_tokens + request.max_tokens, rules.max_len)
        if (
            self.start(name) != NEVER
            or not request.num_prompt_tokens <= computed < end - rules.lead
        ):
            return False
        blocks = [block for m in self._managers for block in m.req_to_blocks[name]]
        return all(block.ref_cnt == 1 for block in blocks) and any(
            schedule and schedule.evicted(computed, computed) for schedule in rules.schedules
        )

    def _watch_preemptions(self) -> None:
        """Nobody is preempted while somebody can shrink."""
        preempt = self.scheduler._preempt_request

        def watched(request: Request, *args: Any, **kwargs: Any) -> None:
            if not self.is_resetting:
                self.seen["preempted"] += 1
                able = [r for r in (*self.scheduler.running, request) if self.can_shrink(r)]
                assert not able, f"{request.request_id} is preempted, {able[0].request_id} is not"
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = watched

    @property
    def _managers(self) -> Any:
        return self.manager.coordinator.single_type_managers

    def _check_held(self, output: Any, waiting: set[str], processed: dict[str, int]) -> None:
        """Every scheduled request holds exactly the pages that the schedule says."""
        loads = self._loads(output)
        for name, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            end = request.num_computed_tokens
            if name in waiting:
                self.hits[name] = end - num_tokens
                self.restored[name] = processed[name] = 0  # nothing of it is evicted by a hit
                if name in loads:
                    self.restored[name] = loads[name].num_tokens
                    assert self.restored[name] == end - num_tokens
                    if self.rules.private_hits and self.start(name) != NEVER:
                        # Cached pages have no scores: it gets back all that it had.
                        loaded = [len(group) for group in loads[name].pages.page_ids]
                        held = [len(pages) for pages in self.held(name)]
                        new = cdiv(end, self.rules.page_size)
                        new -= cdiv(end - num_tokens, self.rules.page_size)
                        assert loaded == [count - new for count in held], f"{name}: hits"
                for manager in self.paged_managers:
                    lost = manager.restored_pages(name)
                    assert not lost or name in loads, f"{name} has not come back"
            self.chunks.setdefault(name, []).append((end - num_tokens, end))
            for schedule, pages in zip(self.rules.schedules, self.held(name), strict=True):
                evicted = 0
                if schedule is not None:
                    known = max(processed[name], self.restored[name])
                    evicted = schedule.evicted(known, self.start(name))
                expected = cdiv(end, self.rules.page_size) - evicted // self.rules.page_size
                assert len(pages) == expected, f"{name} holds {pages}, not {expected} pages"

    def _loads(self, output: Any) -> dict[str, Load]:
        """By request; notes what is special about them."""
        if self.ledger is None:
            return {}
        commands = output.kv_connector_metadata.commands
        loads = {one.request_id: one for one in commands if isinstance(one, Load)}
        for name, load in loads.items():
            lost = [
                s.evicted(load.num_tokens, self.start(name)) if s else 0
                for s in self.rules.schedules
            ]
            num_pages = cdiv(load.num_tokens, self.rules.page_size)
            self.seen["evicted"] += any(lost)
            self.seen["hit"] += not any(lost) and len(load.pages.slots[0]) < num_pages
        return loads

    def _check_ledger(self) -> None:
        """Every slot is free or somebody's."""
        ledger = self.ledger
        for tier, free, size in (
            ("host", ledger._host, ledger.capacity.host_slots),
            ("file", ledger._file, ledger.capacity.file_slots),
        ):
            taken = [slot for one in ledger.swapped.values() for slot in getattr(one, tier)]
            assert sorted([*free, *taken]) == list(range(size))

    def _check_pool(self) -> None:
        """Free and held pages are all pages; reference counts are the numbers of holders."""
        counts = [0] * self.rules.num_pages
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    counts[block.block_id] += not block.is_null
        for manager in self.paged_managers:  # copies that are under way
            for snapshot in manager.cached_pages.snapshots._in_flight:
                counts[snapshot.copy.block_id] += 1
        found = [block.ref_cnt if not block.is_null else 0 for block in self.pool.blocks]
        assert found == counts
        num_held = sum(count > 0 for count in counts)
        assert self.num_free + num_held == self.rules.num_pages - 1
        for manager in self.paged_managers:
            held = {b.block_id for blocks in manager.req_to_blocks.values() for b in blocks}
            assert manager.cached_pages.to_be_written <= held

    def _check_hashed(self) -> None:
        """Every page in the prefix cache holds, raw, what its hash says."""
        for request in self.requests.values():
            self._note_hashes(request)
        for block in self.pool.blocks:
            if block.block_hash is not None:
                found = self.worker.pages[block.block_id]
                assert found == self._hashed[block.block_hash], f"page {block.block_id}"

    def _note_hashes(self, request: Request) -> None:
        """What pages with the hashes of this request must hold."""
        size, done = self.rules.page_size, self._num_noted.get(request.request_id, 0)
        for index in range(done, len(request.block_hashes)):
            for group in range(len(self.rules.schedules)):
                key = make_block_hash_with_group_id(request.block_hashes[index], group)
                if key not in self._hashed:
                    ends = range(index * size + 1, index * size + size + 1)
                    self._hashed[key] = [label_of(group, request.all_token_ids[:e]) for e in ends]
        self._num_noted[request.request_id] = len(request.block_hashes)


def small_world(**rules: Any) -> World:
    """Sixty pages, sequences of 64 tokens, steps of 40, unless told otherwise."""
    return World(Rules(**{"num_pages": 60, "max_len": 64, "batch": 40, **rules}))
