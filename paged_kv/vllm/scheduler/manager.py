"""The scheduler's side of one layer group: which pages a request takes, and gives back.

Pages come and go with the schedule; which of them the prefix cache may show is in cached_pages.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from paged_kv.core.schedule import NEVER, Schedule, cdiv
from paged_kv.vllm.scheduler.cached_pages import CachedPages, longest_hit
from paged_kv.vllm.scheduler.spec import PagedSpec


@dataclass
class _Sequence:
    """What the manager knows of a request.

    Args:
        start: tokens from which it is held to its budget; NEVER if that is not known yet.
        first_write: first page that a compaction may write; None if it cannot get that long, or
            nobody knows when.
        frozen: pages kept in the prefix cache once compactions began; None before.
        raw_pages: full pages at the first compaction, to be copied for the prefix cache.
        copies: shared pages that must become private ones.
        num_hit: pages of its prefix hit.
        is_running: whether the workers know its pages: they must be told of copies.
        num_freed: pages that compactions have given back.
    """

    start: int
    first_write: int | None
    frozen: int | None = None
    raw_pages: int = 0
    copies: list[int] = field(default_factory=list)
    num_hit: int = 0
    is_running: bool = False
    num_freed: int = 0


class PagedManager(SingleTypeKVCacheManager):
    """Allocates pages under a schedule. Told of every request by the scheduler (see begin)."""

    def __init__(self, kv_cache_spec: PagedSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.schedule: Schedule = kv_cache_spec.schedule
        assert self.block_size == self.schedule.page_size
        self._to_compute = max(1, kv_cache_spec.observation_window)  # of a prompt, whatever is hit
        self.private_hits, self.lead = kv_cache_spec.private_hits, kv_cache_spec.lead
        self.max_chunk = 1  # tokens past the start that can be in flight; set by the scheduler
        self.reserve: Callable[[], int] = lambda: 0  # pages that admissions leave to others; same
        self.snapshot_reserve: Callable[[], int] = lambda: 0  # and copies for the prefix cache
        self.cached_pages = CachedPages(self.block_pool, self.kv_cache_group_id, self.block_size)
        self.replaced: set[str] = set()  # running requests whose pages are copied in this step
        self.num_freed = 0  # pages that compactions have given back, so far
        self._sequences: dict[str, _Sequence] = {}

    def begin(self, request_id: str, start: int, max_len: int) -> None:
        """A request has arrived that can grow to max_len tokens."""
        first_write = None
        if self.schedule.evicted(max_len, start) > 0:
            first_write = self._first_write(start)
        self._sequences[request_id] = _Sequence(start, first_write)

    def end(self, request_id: str) -> None:
        """The request is over; its pages are free."""
        del self._sequences[request_id]

    def start(self, request_id: str) -> int:
        """Tokens from which a request is held to its budget; NEVER if it is not."""
        return self._sequences[request_id].start

    def evicted(self, request_id: str, num_tokens: int) -> int:
        """Entries of a request that are dropped after so many tokens."""
        evicted: int = self.schedule.evicted(num_tokens, self._sequences[request_id].start)
        return evicted

    def has_scores(self, request_id: str) -> bool:
        """Whether what lies beside a request's pages depends on its queries."""
        return self.private_hits and self._sequences[request_id].start != NEVER

    def never_hash(self, request_id: str) -> None:
        """None of the request's pages may be in the prefix cache: it is compressed already."""
        self._sequences[request_id].frozen = 0

    def usable_hit(self, request_id: str, blocks: Sequence[KVCacheBlock], copy: bool) -> int:
        """Tokens of a prefix hit that this request may take.

        Nothing up to its start: cached pages are raw, and there the schedule may evict. And no page
        to be copied that is only computed in the step that would copy it, or if not copy.
        """
        sequence = self._sequences[request_id]
        blocks = blocks[: self._max_hit_pages(sequence.start)]
        return self.cached_pages.usable(blocks, sequence.first_write, copy) * self.block_size

    def pages_soon(self, request: Request, num_pages: int) -> int:
        """Pages after the first num_pages that can be hit when this step is done."""
        most = min(request.num_tokens, self._sequences[request.request_id].start)
        hashes = self._block_hashes(request)[: self._max_hit_pages(most)]
        return self.cached_pages.pages_soon(hashes, num_pages)

    def pages_between(self, request_id: str, num_tokens: int, later: int) -> int:
        """Pages that compactions empty between two lengths of the request."""
        earlier, evicted = (self.evicted(request_id, n) for n in (num_tokens, later))
        return (evicted - earlier) // self.block_size

    def peak_pages(self, num_tokens: int, start: int) -> int:
        """Most pages a request holds on its way to num_tokens."""
        # The retained entries begin at a page's start: no page more.
        return cdiv(self.schedule.max_retained(num_tokens, start, self.max_chunk), self.block_size)

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
        """Pages needed. With the cap, what the schedule lets the request hold, not its length.

        And what must stay free for requests that run.
        """
        sequence, reserved = self._sequences[request_id], 0
        if apply_admission_cap:
            num_tokens = self.peak_pages(num_tokens, sequence.start) * self.block_size
            reserved = self.reserve()
        needed: int = reserved + super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if not new_computed_blocks:
            return needed + len(sequence.copies)
        return needed + len(self.cached_pages.to_copy(new_computed_blocks, sequence.first_write))

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        """Takes a prefix hit; notes which of its pages allocate_new_blocks has to copy."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args)
        sequence = self._sequences[request_id]
        sequence.num_hit = len(new_computed_blocks)
        sequence.copies = self.cached_pages.to_copy(new_computed_blocks, sequence.first_write)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Pages up to num_tokens, the length after this step."""
        sequence = self._sequences[request_id]
        copied = self._copy(request_id, sequence) if sequence.copies else []
        sequence.is_running = True
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if sequence.frozen is not None:
            return new
        evicted = self.evicted(request_id, num_tokens)
        if evicted:
            sequence.frozen = evicted // self.block_size
            sequence.raw_pages = num_tokens // self.block_size
            private = {block.block_id for block in copied}
            blocks = self.req_to_blocks[request_id]
            self.cached_pages.freeze(request_id, blocks, sequence.frozen, private)
        return new

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Hashes full pages while they are raw."""
        if self.schedule.compress_prefill:
            return
        request_id = request.request_id
        sequence = self._sequences[request_id]
        first_write = sequence.first_write
        if sequence.frozen is not None:
            num_tokens = min(num_tokens, sequence.frozen * self.block_size)
            first_write = None  # these pages are never written
        start = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        hashed = range(start, self.num_cached_block.get(request_id, 0))
        self.cached_pages.note_hashed(self.req_to_blocks[request_id], hashed, first_write)
        if sequence.raw_pages:
            self._take_snapshots(request, sequence)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Frees the pages that compactions of finished steps have emptied."""
        freed = self.evicted(request_id, processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, 0, freed)
        sequence = self._sequences[request_id]
        freed = min(freed, len(self.req_to_blocks.get(request_id, ())))  # it may have none yet
        self.num_freed += max(0, freed - sequence.num_freed)
        sequence.num_freed = max(freed, sequence.num_freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request ends or is preempted: nobody will rewrite its pages now."""
        self.cached_pages.snapshots.cancel(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        self.cached_pages.release(blocks)
        self.replaced.discard(request_id)
        if request_id in self._sequences:
            sequence = self._sequences[request_id]
            sequence.frozen, sequence.copies, sequence.is_running = None, [], False
            sequence.num_freed = 0
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: PagedSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest run of cached pages from the start, as for full attention."""
        assert not drop_eagle_block, "speculative decoding is refused at start-up"
        page_size = kv_cache_spec.block_size
        return longest_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, page_size, alignment_tokens
        )

    def _first_write(self, start: int) -> int:
        """First page that a compaction at start may write; scores are written from page 0 on."""
        return 0 if self.private_hits else self.schedule.first_evicted(start) // self.block_size

    def _max_hit_pages(self, start: int) -> int:
        return max(0, start - self._to_compute) // self.block_size

    def _copy(self, request_id: str, sequence: _Sequence) -> list[KVCacheBlock]:
        """Replaces shared pages by private ones; the worker copies them before the step runs."""
        if sequence.is_running:
            self.replaced.add(request_id)
        blocks = self.req_to_blocks[request_id]
        private = self.block_pool.get_new_blocks(len(sequence.copies))
        for index, block in zip(sequence.copies, private, strict=True):
            self._apply_cow(request_id, index, blocks[index], block)
        sequence.copies = []
        return private

    def _block_hashes(self, request: Request) -> Any:
        return resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )

    def _take_snapshots(self, request: Request, sequence: _Sequence) -> None:
        """Has the raw pages copied at the end of this step, if the pool has pages to spare."""
        hashes = self._block_hashes(request)
        blocks = self.req_to_blocks[request.request_id][: sequence.raw_pages]
        assert sequence.frozen is not None
        self.cached_pages.snapshots.take(
            request.request_id, blocks, hashes, sequence.frozen, self.snapshot_reserve()
        )
        sequence.raw_pages = 0
