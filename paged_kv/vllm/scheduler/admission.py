"""Which prefix hit a waiting request takes, and how many pages it needs to be admitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from paged_kv.vllm.scheduler.manager import PagedManager
from paged_kv.vllm.scheduler.pressure import Pressure

PAGES_WORTH_A_STEP = 2
"""Computing as much again takes longer than waiting for the step that is being scheduled."""
MOST_AWAITED = 8
"""Waiting requests for which others shrink at once: looking for their prefixes takes time."""


class AdmittingMixin(Scheduler):
    """Overrides for requests that wait."""

    paged_managers: Sequence[PagedManager]
    pressure: Pressure | None
    _held_back: Request | None = None  # can hit more of its prompt when this step is done

    def _get_local_prefix_cache_hit(self, request: Request, *longest: int | None) -> Any:
        # longest: nothing up to vLLM 0.32; the most tokens that may be hit, or None, from 0.33 on.
        self._held_back = None
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(
            request, *longest
        )
        while num_tokens > (limit := self._usable_hit(request, blocks)):
            shorter, num_tokens, _ = self.kv_cache_manager.coordinator.find_longest_cache_hit(
                request.block_hashes, limit
            )
            blocks = self.kv_cache_manager.create_kv_cache_blocks(shorter)
            boundary = 0
        pages = num_tokens // self.paged_managers[0].block_size
        soon = min(manager.pages_soon(request, pages) for manager in self.paged_managers)
        for most in longest:
            if most is not None:
                soon = min(soon, most // self.paged_managers[0].block_size - pages)
        if soon >= PAGES_WORTH_A_STEP:
            self._held_back = request
        return blocks, num_tokens, boundary, diverged

    def _usable_hit(self, request: Request, blocks: Any) -> int:
        copy = self._fits(request, blocks.blocks)
        return min(
            manager.usable_hit(request.request_id, blocks.blocks[manager.kv_cache_group_id], copy)
            for manager in self.paged_managers
        )

    def _fits(self, request: Request, blocks: Any) -> bool:
        """Whether the request could be admitted with this prefix hit.

        A page to be copied takes two pages: of a prompt as long as the pool, copies never fit.
        """
        num_tokens = len(blocks[0]) * self.paged_managers[0].block_size
        needed = self._pages_to_admit(request, blocks, num_tokens)
        return needed <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _pages_to_admit(
        self, request: Request, blocks: Any, num_hit: int, num_back: int = 0
    ) -> int:
        """Free pages that the request needs to be admitted.

        Args:
            request: it waits.
            blocks: its prefix hit, by layer group.
            num_hit: tokens of that.
            num_back: tokens that it gets back from the swap.
        """
        needed: int = self.kv_cache_manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=request.num_tokens,
            new_computed_blocks=blocks,
            num_encoder_tokens=0,
            total_computed_tokens=max(num_hit, num_back),
            num_local_computed_tokens=num_hit,
            num_tokens_main_model=request.num_tokens,
            apply_admission_cap=True,
        )
        return needed

    def _reserved(self) -> int:
        """Pages that an admission leaves to requests that run, and to its own next steps."""
        assert self.pressure is not None
        if not self.running:
            return 0
        return self.pressure.reserved(self.running) + self.pressure.pages_each

    def _awaited(self) -> Iterator[int]:
        """Pages that each of the first waiting requests needs, beside what is left to others."""
        assert self.pressure is not None
        if self._pause_state != PauseState.UNPAUSED:
            return
        seats = self.max_num_active_reqs - len(self.running)
        for request in islice(self.waiting, max(0, min(seats, MOST_AWAITED))):
            if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                return
            blocks, num_tokens, *_ = self._get_local_prefix_cache_hit(request)
            if request is not self._held_back:
                back = self._restored_tokens(request)
                pages = self._pages_to_admit(request, blocks.blocks, num_tokens, back)
                yield pages - self.pressure.reserved(self.running)

    def _restored_tokens(self, request: Request) -> int:
        """Tokens that a waiting request gets back."""
        return 0
