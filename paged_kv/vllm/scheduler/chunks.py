"""How many tokens of a request a step may compute."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from paged_kv.vllm.scheduler.manager import PagedManager
from paged_kv.vllm.scheduler.pressure import Pressure


class ClippingMixin(Scheduler):
    """Cuts chunks before pages are allocated for them."""

    paged_managers: Sequence[PagedManager]
    pressure: Pressure | None
    _held_back: Request | None
    _prompt_chunk: int | None  # most tokens of a prompt in a step; None: as many as vLLM likes
    _resume_chunk: int  # most tokens past its start that a resumed request computes in a step

    def _clip_chunk(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of a chunk that may be computed: it ends at the request's start.

        Chunks of a prompt that is compressed meanwhile are bounded, and so is what a resumed
        request recomputes after its start. Nothing of a request that can hit more of its prompt
        when this step is done.
        """
        if request is self._held_back:
            return 0
        hits = num_new_local_computed_tokens + num_external_computed_tokens
        start = request.num_computed_tokens + hits
        remaining = self.paged_managers[0].start(request.request_id) - start
        if remaining > 0:
            most = min(remaining, self._prompt_chunk or remaining)
        else:
            most = self._resume_chunk
        num_tokens = min(num_new_tokens, most)
        return 0 if self._awaits_pages(request, start + num_tokens) else num_tokens

    _mamba_block_aligned_split = _clip_chunk

    def _awaits_pages(self, request: Request, num_tokens: int) -> bool:
        """Whether to let a running request wait: steps in flight emptied pages that it needs.

        Its own, or those of requests that shrink. vLLM would preempt for them; a request that is
        alone preempts itself, recomputes, and is there again.
        """
        if request.status != RequestStatus.RUNNING:
            return False
        name, computed = request.request_id, request.num_computed_tokens
        processed = computed - request.num_in_flight_tokens
        frees = any(m.pages_between(name, processed, computed) for m in self.paged_managers)
        if not frees and not (self.pressure and self.pressure.is_coming(self.requests)):
            return False
        self.kv_cache_manager.remove_skipped_blocks(name, processed, request.num_prompt_tokens)
        needed = self.kv_cache_manager.coordinator.get_num_blocks_to_allocate(
            request_id=name,
            num_tokens=num_tokens,
            new_computed_blocks=self.kv_cache_manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=computed,
            num_local_computed_tokens=computed,
            num_tokens_main_model=num_tokens,
        )
        return needed > self.kv_cache_manager.block_pool.get_num_free_blocks()
