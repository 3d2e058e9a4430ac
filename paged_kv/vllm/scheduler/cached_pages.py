"""Pages of one layer group in the prefix cache: who may read which, and until when.

Prefix caching stays on. Of a request's pages, those below its first eviction are never written
again; they are hashed and shared as ever, also after they were freed. The rest will be rewritten by
compactions, so nobody may read them through the prefix cache once that has begun:

    prompt    | shared, immutable | will be rewritten: private, raw until the first compaction |
              0             first_write                                                     start

* A hit on a page that this request, or its present owner, will rewrite is copied at admission.
* When the step that ends in the first compaction is scheduled, the pages above first_write lose
  their hashes to copies (snapshots.py). Shared or hashed pages are never written: see freeze.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_block_hashes

from paged_kv.vllm.scheduler.snapshots import Snapshots


class CachedPages:
    """What the prefix cache may show of a layer group's pages.

    Args:
        block_pool: has the cache.
        group_id: vLLM's number of the layer group.
        page_size: tokens per page.

    Attributes:
        snapshots: copies that are made for the cache.
        to_be_written: ids of hashed pages that their owner will rewrite.
    """

    def __init__(self, block_pool: BlockPool, group_id: int, page_size: int) -> None:
        self.block_pool = block_pool
        self.group_id = group_id
        self.snapshots = Snapshots(block_pool, group_id, page_size)
        self.to_be_written: set[int] = set()
        self._hashed_in_step: set[int] = set()  # page ids; not computed before the next step

    def to_copy(self, blocks: Sequence[KVCacheBlock], first_write: int | None) -> list[int]:
        """Indices of the pages of a hit that a request must not share, but copy.

        Args:
            blocks: the hit, from the prompt's start on.
            first_write: first page that the request itself may rewrite; None: it rewrites none.
        """
        first = len(blocks) if first_write is None else first_write
        return [
            index
            for index, block in enumerate(blocks)
            if index >= first or block.block_id in self.to_be_written
        ]

    def usable(self, blocks: Sequence[KVCacheBlock], first_write: int | None, copy: bool) -> int:
        """Leading pages of a hit that a request may take; see to_copy.

        It ends before a page to be copied if nothing may be (copy), or if that page is only
        computed in the step that would copy it.
        """
        for index in self.to_copy(blocks, first_write):
            if not copy or blocks[index].block_id in self._hashed_in_step:
                return index
        return len(blocks)

    def pages_soon(self, hashes: Sequence[BlockHash], num_pages: int) -> int:
        """Pages after the first num_pages that can be hit when this step is done.

        Args:
            hashes: of all pages that the request may ever hit.
            num_pages: that it hits now.
        """
        soon = self.snapshots.block_hashes()
        for index in range(num_pages, len(hashes)):
            cached = self.block_pool.get_cached_block(hashes[index], [self.group_id])
            in_step = cached is not None and cached[0].block_id in self._hashed_in_step
            if not in_step and hashes[index] not in soon:
                return index - num_pages
        return max(0, len(hashes) - num_pages)

    def note_hashed(
        self, blocks: Sequence[KVCacheBlock], indices: Iterable[int], first_write: int | None
    ) -> None:
        """These pages of a request got their hashes in the step that is being scheduled."""
        for index in indices:
            self._hashed_in_step.add(blocks[index].block_id)
            if first_write is not None and index >= first_write:
                self.to_be_written.add(blocks[index].block_id)

    def will_write(self, blocks: Sequence[KVCacheBlock], first_write: int) -> None:
        """A request's pages from first_write on will be rewritten; of shared ones, its copies."""
        self.to_be_written.update(
            block.block_id
            for block in blocks[first_write:]
            if block.block_hash is not None and block.ref_cnt == 1
        )

    def freeze(
        self, request_id: str, blocks: Sequence[KVCacheBlock], first_kept: int, copied: set[int]
    ) -> None:
        """This step ends in a request's first compaction: what it writes leaves the prefix cache.

        Args:
            request_id: its name.
            blocks: all its pages.
            first_kept: the first one that the compaction may write.
            copied: ids of pages that are copied in this step.
        """
        written = blocks[first_kept:]
        hashed = {block.block_id for block in written if block.block_hash is not None}
        self.block_pool.evict_blocks(hashed)
        # All of its pages: a resumed request may keep more of them than first_write said.
        self.to_be_written.difference_update(block.block_id for block in blocks)
        for block in written:
            # A page copied in this step is also held by the copy until it has run.
            assert block.ref_cnt == 1 + (block.block_id in copied), (
                f"page {block.block_id} of {request_id} is shared and would be rewritten"
            )

    def release(self, blocks: Sequence[KVCacheBlock]) -> None:
        """A request has lost its pages: nobody will rewrite them now."""
        ids = {block.block_id for block in blocks}
        self.to_be_written -= ids
        # A victim that this step had already scheduled: these are not going to be computed.
        self.block_pool.evict_blocks(ids & self._hashed_in_step)

    def end_step(self) -> None:
        """A step is scheduled: what it hashed is computed before the next one."""
        self._hashed_in_step.clear()


def longest_hit(
    block_hashes: Any,
    max_length: int,
    group_ids: list[int],
    block_pool: BlockPool,
    page_size: int,
    alignment: int,
) -> tuple[tuple[list[KVCacheBlock], ...], int]:
    """(pages of each layer group, tokens) of the longest run of cached pages from the start.

    Args:
        block_hashes: of the prompt, as the request has them.
        max_length: most tokens.
        group_ids: vLLM's numbers of the layer groups.
        block_pool: has the cache.
        page_size: tokens per page.
        alignment: the tokens are a multiple of it.
    """
    hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, page_size)
    hits: tuple[list[KVCacheBlock], ...] = tuple([] for _ in group_ids)
    for block_hash, _ in zip(hashes, range(max_length // page_size), strict=False):
        cached = block_pool.get_cached_block(block_hash, group_ids)
        if not cached:
            break
        for hit, block in zip(hits, cached, strict=True):
            hit.append(block)
    num_tokens = len(hits[0]) * page_size
    num_tokens -= num_tokens % alignment
    for hit in hits:
        del hit[num_tokens // page_size :]
    return hits, num_tokens
