"""Requests whose start is set late: their pages are for others, too, until then.

start = NEVER       pages are hashed and shared as vLLM does it
shrink_from         shared pages that compactions may write become copies, at once;
                    hashed ones are copied for whoever hits them from now on
start is reached    the first compaction, as ever
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from paged_kv.core.schedule import NEVER
from paged_kv.vllm.scheduler.manager import PagedManager


class ShrinkingManager(PagedManager):
    """A PagedManager that is told starts of running requests."""

    def shrink_from(self, request_id: str, start: int) -> None:
        """A running request will be held to its budget: its pages are not for others any more."""
        sequence, blocks = self._sequences[request_id], self.req_to_blocks[request_id]
        assert sequence.start == NEVER, "a start never changes"
        sequence.start, sequence.first_write = start, self._first_write(start)
        self.cached_pages.will_write(blocks, sequence.first_write)
        sequence.copies = [i for i, _ in self._shared(blocks, sequence.first_write)]

    def num_to_copy(self, request_ids: Iterable[str]) -> int:
        """Pages for the copies without which none of these can shrink, because of scores."""
        if not self.private_hits:
            return 0
        sequences = (self._sequences[name] for name in request_ids)
        return max((s.num_hit for s in sequences if s.start == NEVER), default=0)

    def shrinking(self, request_id: str, start: int) -> tuple[list[KVCacheBlock], int, int]:
        """What shrink_from would come to: nothing is changed.

        Returns:
            pages that the request would leave (free, if nobody else has them), pages that must be
            copied before, and how many of the copies it would keep.
        """
        blocks = self.req_to_blocks[request_id]
        evicted = self.schedule.evicted(start, start) // self.block_size
        shared = list(self._shared(blocks, self._first_write(start)))
        kept = [block for index, block in shared if index >= evicted]
        return blocks[:evicted] + kept, len(shared), len(kept)

    def _shared(
        self, blocks: Sequence[KVCacheBlock], first: int
    ) -> Iterator[tuple[int, KVCacheBlock]]:
        """Pages from `first` on that others hold, too, with their indices."""
        return ((i, block) for i, block in enumerate(blocks) if i >= first and block.ref_cnt > 1)
