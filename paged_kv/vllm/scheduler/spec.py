"""The KV cache spec of a compressed layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import Self
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from paged_kv.core.page_counts import reserved_pages
from paged_kv.core.schedule import Schedule
from paged_kv.vllm.scheduler import limits


@dataclass(frozen=True, kw_only=True)
class PagedSpec(AttentionSpec):
    """Full attention that keeps a budget.

    Derives from AttentionSpec: FullAttentionSpec.merge would drop the schedule and put layers with
    different budgets into one group, and slots of ours are not stable, which is what vLLM's
    offloading takes a FullAttentionSpec to promise.

    Args:
        schedule: which slots are free after n tokens. Carries the page size: block_size can be the
            attention kernel's, a divisor of it.
        max_prompt_len: the longest prompt that is admitted, where the pool holds less than
            max_model_len tokens (see PagedWorker.get_kv_cache_spec); None for no limit.
        observation_window: last tokens of a prompt that are always computed: the policy looks at
            their queries, which the prefix cache does not hold.
        private_hits: whether a request gets pages of its own for a prefix hit, since the policy
            keeps scores beside them that depend on the request's queries.
        lead: see Policy.lead.
    """

    schedule: Schedule
    max_prompt_len: int | None = None
    observation_window: int = 0
    private_hits: bool = False
    lead: int = 1

    @classmethod
    def from_full(cls, spec: FullAttentionSpec, schedule: Schedule, **more: Any) -> PagedSpec:
        """The same pages under a schedule; more: the other fields."""
        values = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
        return cls(**values, schedule=schedule, **more)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What one request can hold: vLLM's start-up check and its reported concurrency."""
        max_len = vllm_config.model_config.max_model_len
        chunk = limits.prompt_chunk(vllm_config) if self.schedule.compress_prefill else 1
        in_flight = chunk * vllm_config.max_concurrent_batches
        limit = self.max_prompt_len
        pages = reserved_pages(self.schedule, self.block_size, max_len, in_flight, limit)
        return pages * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Only equal specs share a group; vLLM expects an AssertionError otherwise."""
        assert all(spec == specs[0] for spec in specs), (
            "layers with different budgets cannot share a group"
        )
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Or layers with different budgets would become one group. Page formats may differ."""
        return all(
            isinstance(spec, PagedSpec) and dataclasses.replace(spec, **self._format()) == self
            for spec in kv_cache_specs.values()
        )

    def _format(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "state_content_bytes": self.state_content_bytes}
