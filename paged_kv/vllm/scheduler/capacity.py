"""How much decodes at once in a pool of pages, and how fast a resumed request may come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from paged_kv.core.page_counts import most_pages, window_pages
from paged_kv.core.schedule import cdiv
from paged_kv.vllm.scheduler import limits
from paged_kv.vllm.scheduler.manager import PagedManager

logger = init_logger(f"vllm.{__name__}")


class PoolCapacity:
    """What a scheduler's pool of pages has room for.

    Args:
        vllm_config: with a plan.
        managers: of all layer groups; those of compressed layers are PagedManagers.
        num_pages: of the pool, vLLM's null page included.
    """

    def __init__(self, vllm_config: Any, managers: Sequence[Any], num_pages: int) -> None:
        self.vllm_config = vllm_config
        self.max_len: int = vllm_config.model_config.max_model_len
        self.num_pages = num_pages
        self.longest_prompt = limits.max_prompt_len(vllm_config, num_pages)  # None: any
        self.managers = [m for m in managers if isinstance(m, PagedManager)]
        specs = [m.kv_cache_spec for m in managers if not isinstance(m, PagedManager)]
        self._num_other_pages = sum(map(self._reserved_pages, specs))  # prompts included
        self._num_others_decoding = sum(map(self._decoding_pages, specs))

    def pages_per_sequence(self) -> int:
        """Pages of a sequence that decodes up to max_model_len, in all groups."""
        return self._num_others_decoding + self._most_pages(0, 1)

    def plain_pages(self, num_layers: Sequence[int]) -> float:
        """Those that it would hold without a policy, padding left out.

        Args:
            num_layers: of the groups of compressed layers; the largest fills a page of the pool.
        """
        whole = cdiv(self.max_len, self.managers[0].block_size)
        return self._num_others_decoding + whole * sum(num_layers) / max(num_layers)

    def resume_chunk(self) -> int:
        """Tokens past the prompt that a step may recompute: a budget, or what the pool holds.

        Admission reserves for each group the most that it holds, at whatever time.
        """
        longest = self.longest_prompt or self.max_len
        batches = self.vllm_config.max_concurrent_batches
        room = self.num_pages - 1 - self._num_other_pages
        budget = max(m.schedule.budget(self.max_len) for m in self.managers)
        chunks = range(budget, 0, -self.managers[0].block_size)
        return next((n for n in chunks if self._most_pages(longest, n * batches) <= room), 1)

    def log(self, prompt_chunk: int | None, in_flight: int) -> None:
        """The last word on it: vLLM has counted prompts that are held whole.

        Args:
            prompt_chunk: most tokens of a prompt in a step; None: prompts are held whole.
            in_flight: most tokens of a sequence in the steps that run at once.
        """
        num_pages, pages = self.num_pages - 1, self.pages_per_sequence()
        prompts = "any" if self.longest_prompt is None else f"{self.longest_prompt:,} tokens"
        if prompt_chunk is not None:
            meanwhile = self._num_other_pages + self._most_pages(0, in_flight)
            prompts += (
                f", in pieces of {prompt_chunk:,} tokens, meanwhile {num_pages / meanwhile:.2f} "
                f"sequences ({meanwhile} pages each): smaller pieces hold less, larger ones are "
                "computed faster (--long-prefill-token-threshold, at most --max-num-batched-tokens)"
            )
        logger.info(
            "paged_kv decode capacity: %.2f sequences of %s tokens once their prompts are done "
            "(%d pages each). This, not vLLM's maximum concurrency, is how many can decode at "
            "once. Longest prompt: %s",
            num_pages / pages,
            f"{self.max_len:,}",
            pages,
            prompts,
        )

    def _reserved_pages(self, spec: Any) -> int:
        """Of a group without a schedule, by which vLLM admits a sequence of max_model_len."""
        return cdiv(spec.max_memory_usage_bytes(self.vllm_config), spec.page_size_bytes)

    def _decoding_pages(self, spec: Any) -> int:
        """The same of a sequence that decodes, in steps of one token."""
        if not isinstance(spec, SlidingWindowSpec):
            return self._reserved_pages(spec)
        batches = self.vllm_config.max_concurrent_batches
        return window_pages(spec.sliding_window, spec.block_size, self.max_len, batches)

    def _most_pages(self, prompt_len: int, chunk: int) -> int:
        """Most pages of compressed layers that a sequence holds on its way to max_model_len."""
        return sum(
            most_pages(m.schedule, m.block_size, self.max_len, prompt_len, chunk)
            for m in self.managers
        )
