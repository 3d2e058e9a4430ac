"""Keeps the raw pages of a prompt in the prefix cache when its owner is about to rewrite them.

At its first compaction a request stops being a source of prefix hits for the pages that it
rewrites. Without more, a shared prefix shorter than the budget would be computed anew for every
request. So a page is copied once per distinct prefix, at the end of that step, just before the
compaction:

    schedule      take a page for the copy
    run           forward pass, copy, compaction
    step is done  the copy gets the hash, and is free (evictable) like any cached page

The copies are taken only from pages that nobody is going to need soon.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    KVCacheBlockCopy,
    make_block_hash_with_group_id,
)


class _Snapshot(NamedTuple):
    request_id: str
    block_hash: BlockHash
    num_tokens: int  # of the prefix that ends with this page
    source: KVCacheBlock
    copy: KVCacheBlock


class Snapshots:
    """Pages being copied for the prefix cache, of one layer group.

    Args:
        block_pool: gives and takes the pages.
        group_id: vLLM's number of the layer group.
        page_size: tokens per page.
    """

    def __init__(self, block_pool: BlockPool, group_id: int, page_size: int) -> None:
        self.block_pool = block_pool
        self.group_id = group_id
        self.page_size = page_size
        self._taken: list[_Snapshot] = []  # in the step that is being scheduled
        self._in_flight: list[_Snapshot] = []

    def take(
        self,
        request_id: str,
        blocks: list[KVCacheBlock],
        block_hashes: list[BlockHash],
        first: int,
        reserve: int,
    ) -> None:
        """Has the pages blocks[first:] copied that nobody else has in the cache.

        Args:
            request_id: their owner.
            blocks: its pages, full up to len(block_hashes).
            block_hashes: of its full pages.
            first: the first page that will be rewritten.
            reserve: pages to leave free for others.
        """
        missing = [
            index
            for index in range(first, min(len(blocks), len(block_hashes)))
            if self.block_pool.get_cached_block(block_hashes[index], [self.group_id]) is None
        ]
        spare = self.block_pool.get_num_free_blocks() - reserve
        missing = missing[: max(0, spare)]  # the front is worth more: hits begin at the start
        copies = self.block_pool.get_new_blocks(len(missing))
        for index, copy in zip(missing, copies, strict=True):
            length = (index + 1) * self.page_size
            self._taken.append(
                _Snapshot(request_id, block_hashes[index], length, blocks[index], copy)
            )

    def block_hashes(self) -> set[BlockHash]:
        """Of the pages that the step being scheduled copies."""
        return {snapshot.block_hash for snapshot in self._taken}

    def drain(self) -> list[KVCacheBlockCopy]:
        """What the worker has to copy at the end of the step that has just been scheduled."""
        drained, self._taken = self._taken, []
        self._in_flight += drained
        return [KVCacheBlockCopy(s.source.block_id, s.copy.block_id) for s in drained]

    def cancel(self, request_id: str) -> None:
        """The owner lost its pages while the step is scheduled: somebody else may write them."""
        dropped = [snapshot.copy for snapshot in self._taken if snapshot.request_id == request_id]
        self._taken = [s for s in self._taken if s.request_id != request_id]
        self.block_pool.free_blocks(dropped)

    def drop(self) -> None:
        """Nobody shall hit the copies of steps in flight: whoever gets their pages writes later."""
        self.block_pool.free_blocks([snapshot.copy for snapshot in self._in_flight])
        self._in_flight = []

    def publish(self) -> None:
        """A step is complete: any step scheduled from now on runs after the copies."""
        for snapshot in self._in_flight:
            key = make_block_hash_with_group_id(snapshot.block_hash, self.group_id)
            self.block_pool._insert_block_hash(key, snapshot.copy, num_tokens=snapshot.num_tokens)
        # Last pages first: they are evicted first.
        self.block_pool.free_blocks(snapshot.copy for snapshot in reversed(self._in_flight))
        self._in_flight = []
