"""Requests that come back compressed, from the swap's tiers, instead of computed again.

    logical pages   | freed | restored ............ | new |
                    0       evicted(num_tokens)     num_tokens

Such a request holds what it held when it was preempted: a budget, not its length. Nothing of it is
in the prefix cache, and no prefix hit is any use to it: cached pages are raw.

PagedManager knows nothing of it; without a swap nothing is ever restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from paged_kv.core.schedule import cdiv
from paged_kv.vllm.scheduler.shrinking import ShrinkingManager


class RestoringManager(ShrinkingManager):
    """A PagedManager that knows which requests come back, and with how many tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._restored: dict[str, int] = {}  # tokens that a request gets back, or got

    def restore(self, request_id: str, num_tokens: int) -> int:
        """A waiting request gets so many tokens back; returns how many of them are evicted."""
        self._restored[request_id] = num_tokens
        return self.restored_pages(request_id, num_tokens) * self.block_size

    def forget_restored(self, request_id: str) -> None:
        """The request has lost its pages, or ended."""
        self._restored.pop(request_id, None)

    def restored_pages(self, request_id: str, num_tokens: int | None = None) -> int:
        """Leading pages that a request had lost when it came back; 0 if it came back raw, or not.

        Args:
            request_id: its name.
            num_tokens: that are computed when it is admitted; if these are not what it gets back,
                it does not come back.
        """
        restored = self._restored.get(request_id, 0)
        if not restored or num_tokens not in (None, restored):
            return 0
        return self.evicted(request_id, restored) // self.block_size

    def end(self, request_id: str) -> None:
        """The request is over; its pages are free."""
        super().end(request_id)
        self.forget_restored(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Pages needed; to be admitted with what comes back, fewer than for all its tokens."""
        is_new = request_id not in self.num_cached_block
        if is_new and self.restored_pages(request_id, total_computed_tokens):
            reserved = self.reserve() if apply_admission_cap else 0
            return reserved + self._pages_to_restore(request_id, num_tokens, apply_admission_cap)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )

    def allocate_external_computed_blocks(
        self, request_id: str, num_local_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Pages for what comes back."""
        freed = self.restored_pages(request_id)
        assert not (freed and num_local_computed_tokens), "a prefix hit is raw"
        self.req_to_blocks[request_id].extend([self._null_block] * freed)
        self._sequences[request_id].num_freed = freed
        super().allocate_external_computed_blocks(
            request_id, num_local_computed_tokens, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Pages up to num_tokens, the length after this step."""
        if self.restored_pages(request_id):
            self.never_hash(request_id)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request ends or is preempted: it has nothing that it got back."""
        self.forget_restored(request_id)
        return super().pop_blocks_for_free(request_id)

    def _pages_to_restore(self, request_id: str, num_tokens: int, peak: bool) -> int:
        """Pages that such a request needs to be admitted; peak: on its way to num_tokens."""
        start = self.start(request_id)
        now = cdiv(num_tokens, self.block_size) - self.restored_pages(request_id)
        if not peak:
            return now
        if self._restored[request_id] < start:
            return self.peak_pages(num_tokens, start)
        # Its start is behind it: from here on it never holds more than a budget and a chunk.
        most = self.schedule.max_retained(num_tokens, 0, self.max_chunk)
        return min(now, cdiv(most, self.block_size))
