"""vLLM's schedulers, that know from where on requests are held to their budgets: their starts.

Two things would go wrong without. A preempted request comes back with its output, and admission
would reserve pages for all of it, possibly more than the pool has. And its recomputation would run
past its start in one chunk, which needs those pages at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from paged_kv.core.schedule import NEVER, cdiv
from paged_kv.vllm.plan import get_plan
from paged_kv.vllm.scheduler import limits
from paged_kv.vllm.scheduler.admission import AdmittingMixin
from paged_kv.vllm.scheduler.capacity import PoolCapacity
from paged_kv.vllm.scheduler.chunks import ClippingMixin
from paged_kv.vllm.scheduler.manager import PagedManager
from paged_kv.vllm.scheduler.pressure import Pressure
from paged_kv.vllm.scheduler.pressure_log import PressureLog
from paged_kv.vllm.scheduler.refusing import RefusingMixin
from paged_kv.vllm.scheduler.restoring import RestoringManager
from paged_kv.vllm.scheduler.watching import SchedulerWatch
from paged_kv.vllm.swap.scheduler import SwapMixin


class _PagedMixin(AdmittingMixin, ClippingMixin, RefusingMixin):
    """Overrides shared by the synchronous and the asynchronous scheduler."""

    need_mamba_block_aligned_split: bool
    paged_managers: Sequence[PagedManager]  # of the layer groups under a schedule
    pressure: Pressure | None = None  # sets the starts; None: they are where prompts end

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.paged_managers = [m for m in managers if isinstance(m, PagedManager)]
        self.capacity = PoolCapacity(self.vllm_config, managers, self.kv_cache_config.num_blocks)
        assert not self.need_mamba_block_aligned_split, "Mamba hybrids are refused at start-up"
        # vLLM's one hook where a chunk's length can be cut before pages are allocated for it,
        # unless it carries our source patch (see patches/), which has _clip_chunk.
        self.need_mamba_block_aligned_split = not hasattr(Scheduler, "_clip_chunk")
        self._resume_chunk, self._prompt_chunk = self.capacity.resume_chunk(), None
        plan = get_plan(self.vllm_config)
        if plan.compress_prefill:
            self._prompt_chunk = limits.prompt_chunk(self.vllm_config)
            self._resume_chunk = min(self._resume_chunk, self._prompt_chunk)
        chunk = self._prompt_chunk or self._resume_chunk
        batches = self.vllm_config.max_concurrent_batches
        for manager in self.paged_managers:
            manager.max_chunk = chunk * batches
            manager.snapshot_reserve = self._snapshot_reserve
        if plan.waits_for_pressure:
            longest, by_priority = self.capacity.longest_prompt, self.policy.value == "priority"
            layers = [len(group.layer_names) for group in self.kv_cache_config.kv_cache_groups]
            self.pressure = Pressure(
                managers, batches, self.max_model_len, longest, by_priority, layers
            )
            self._pressure_log = PressureLog(self.pressure.counts)
            self.paged_managers[0].reserve = self._reserved  # of all groups together
        self.capacity.log(self._prompt_chunk, chunk * batches)
        self._watch = SchedulerWatch(self) if self.log_stats else None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step; tells the worker which raw pages to copy before it compacts.

        And from where on requests are held to their budgets, if that was decided now.
        """
        if self.pressure is not None:
            self.pressure.relieve(self.running, self._awaited(), self.requests)
        output = super().schedule(*args, **kwargs)
        if self.pressure is not None and output.total_num_scheduled_tokens:
            output.paged_kv_starts = self.pressure.drain()
            output.paged_kv_pages = self._replaced_pages(output)
            if self._pressure_log.is_due:
                self._pressure_log.write(self.pressure.num_held(self.running), len(self.running))
        for manager in self.paged_managers:
            manager.cached_pages.end_step()
        copies = [copy for m in self.paged_managers for copy in m.cached_pages.snapshots.drain()]
        output.paged_kv_snapshots = copies  # an attribute more: travels with the pickled output
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """A step is done: its copies can be hit."""
        for manager in self.paged_managers:
            manager.cached_pages.snapshots.publish()
        return super().update_from_output(*args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM tells its loggers after each step; ours find what we count by then."""
        if self._watch is not None:
            self._watch.update()
        return super().make_stats(*args, **kwargs)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forgets cached pages; those that a step in flight copies are no reason to fail."""
        if reset_running_requests or not self.running:
            for manager in self.paged_managers:
                manager.cached_pages.snapshots.drop()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def add_request(self, request: Request) -> None:
        """Registers the request with the managers; refuses one that can never run.

        The front end has refused it before, but where it takes the engines for larger than this
        one is. Nothing may raise here: it would end the engine.
        """
        try:
            limits.check_request(self.vllm_config, request, self.kv_cache_config.num_blocks)
        except ValueError as error:
            self.refuse(request, error)
            return
        name, start = request.request_id, request.num_prompt_tokens
        if self.pressure is not None:
            start = self.pressure.first_start(request.num_prompt_tokens)
            if start != NEVER:
                self.pressure.tell(name, start)
        max_len = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        for manager in self.paged_managers:
            manager.begin(name, start, max_len)
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        for manager in self.paged_managers:
            manager.end(request.request_id)
        if self.pressure is not None:
            self.pressure.end(request.request_id)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if self.pressure is not None:
            self.pressure.forget(request.request_id)

    def _snapshot_reserve(self) -> int:
        """Pages that copies for the prefix cache leave: what running requests may need soon."""
        if self.pressure is not None:
            return self.pressure.reserved(self.running) + self.pressure.num_awaited
        return 2 * len(self.paged_managers) * len(self.paged_managers[0].req_to_blocks)

    def _replaced_pages(self, output: SchedulerOutput) -> dict[str, tuple[list[int], ...]]:
        """All pages that running requests had before this step, of those of which some are copied.

        vLLM tells the workers of new pages at the end only.
        """
        names = {name for manager in self.paged_managers for name in manager.replaced}
        for manager in self.paged_managers:
            manager.replaced.clear()
        pages = {}
        for name in names & output.num_scheduled_tokens.keys():
            before = self.requests[name].num_computed_tokens - output.num_scheduled_tokens[name]
            managers = self.kv_cache_manager.coordinator.single_type_managers
            ids = zip(managers, self.kv_cache_manager.get_block_ids(name), strict=True)
            pages[name] = tuple(row[: cdiv(before, m.block_size)] for m, row in ids)
        return pages


class _RestoringMixin(SwapMixin, _PagedMixin):
    """Overrides for requests that come back from the swap; without one they change nothing."""

    paged_managers: Sequence[RestoringManager]

    def _get_local_prefix_cache_hit(self, request: Request, *longest: int | None) -> Any:
        restored, name = self.restorable_tokens(request), request.request_id
        evicted = [m.restore(name, restored) for m in self.paged_managers]
        scored = restored and any(m.has_scores(name) for m in self.paged_managers)
        # What comes back is compressed, or has scores; cached pages are not, and have none.
        if scored or any(evicted):
            self._held_back = None
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        hit = super()._get_local_prefix_cache_hit(request, *longest)
        if restored:  # nothing that it could wait for is longer
            self._held_back = None
        return hit

    def _restored_tokens(self, request: Request) -> int:
        return self.restorable_tokens(request)


class PagedScheduler(_RestoringMixin):
    """The synchronous scheduler."""


class PagedAsyncScheduler(_RestoringMixin, AsyncScheduler):
    """The asynchronous scheduler: pages are freed when the step that emptied them is processed."""
