"""vLLM's schedulers that tell the swap of a preemption while its victim still has its pages."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from paged_kv.vllm.swap.connector import SwapConnector


class SwapMixin(Scheduler):
    """Overrides shared by all our schedulers; without a swap connector they do nothing."""

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.connector, SwapConnector):
            self.connector.swap_out(request)
        super()._preempt_request(request, *args, **kwargs)

    def restorable_tokens(self, request: Request) -> int:
        """Tokens that a preempted request gets back from the tiers; 0 if it is computed again."""
        if not isinstance(self.connector, SwapConnector) or request.skip_reading_prefix_cache:
            return 0
        return self.connector.restorable(request)


class SwapScheduler(SwapMixin):
    """The synchronous scheduler, without a policy."""


class SwapAsyncScheduler(SwapMixin, AsyncScheduler):
    """The asynchronous scheduler, without a policy."""
