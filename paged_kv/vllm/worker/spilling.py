"""Entries that compactions spilled: the stores of running requests, and what they came to."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.platforms import current_platform

from paged_kv.config import CompressionConfig
from paged_kv.store.spill_stores import SpillStores
from paged_kv.tiers.spill_memory import SpillSpace

logger = init_logger(f"vllm.{__name__}")


class SpillStats(NamedTuple):
    """What spilling came to on one worker; entries are those of one KV head of one layer.

    Args:
        requests: that have spilled something and are not done.
        entries: on a lower tier now.
        spilled: so far, net of those that came back.
        fetched: that came back so far, or that a compaction spared for having more attention than a
            survivor.
        dropped: for which there was no room any more, so far.
        host_bytes: memory that stores have taken.
        mmap_bytes: the same, of files.
    """

    requests: int
    entries: int
    spilled: int
    fetched: int
    dropped: int
    host_bytes: int
    mmap_bytes: int


class RequestStores(SpillStores[str]):
    """The stores of one worker.

    A request gets its stores at its first compaction. They end with the request, and when it is
    preempted: recomputing it spills anew. Whoever keeps the pages of a preempted request says so
    (`keep`); then its stores wait, too.

    Args:
        space: of each store.
    """

    def __init__(self, space: SpillSpace) -> None:
        super().__init__(space)
        self._kept: set[str] = set()
        self.num_fetched = 0  # see SpillStats
        self._num_spilled = self._num_dropped = 0  # by requests that are gone

    def update(self, scheduler_output: Any) -> None:
        """Requests have come and gone in this step; before its compactions."""
        resumed = set(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        # For the V2 runner those that come back are new ones.
        resumed |= {new.req_id for new in scheduler_output.scheduled_new_reqs}
        interrupted = resumed | (scheduler_output.preempted_req_ids or set())
        for request in scheduler_output.finished_req_ids | (interrupted - self._kept):
            self.drop(request)
        self._kept -= resumed

    def keep(self, request: str) -> None:
        """Its pages are kept while it is preempted, until it resumes: so are its stores."""
        self._kept.add(request)

    def drop(self, request: str) -> None:
        """The request is gone, or its pages are."""
        self._kept.discard(request)
        for store in self._stores.pop(request, {}).values():
            dropped = store.num_lost * store.shape[1]
            self._num_dropped += dropped
            self._num_spilled += store.num_entries * store.shape[1] + dropped
            store.close()

    def clear(self) -> None:
        """Drops everything."""
        for request in list(self._stores):
            self.drop(request)

    @property
    def known_bytes(self) -> dict[str, int]:
        """num_bytes, but for what is on its way."""
        sizes = [store.known_bytes for store in self.stores]
        return {tier: sum(size[tier] for size in sizes) for tier in ("host", "mmap")}

    def stats(self) -> SpillStats:
        """Waits for what is on its way."""
        dropped = sum(store.num_lost * store.shape[1] for store in self.stores)
        entries, num_bytes = self.num_entries, self.num_bytes
        return SpillStats(
            requests=len(self._stores),
            entries=entries,
            spilled=self._num_spilled + entries + dropped,
            fetched=self.num_fetched,
            dropped=self._num_dropped + dropped,
            host_bytes=num_bytes["host"],
            mmap_bytes=num_bytes["mmap"],
        )

    def close(self) -> None:
        """Drops everything; logs what it came to."""
        self.clear()
        stats = self.stats()
        logger.info(
            "paged_kv spilled %d entries (per layer and KV head), fetched %d, dropped %d for lack "
            "of room",
            *(stats.spilled, stats.fetched, stats.dropped),
        )


def make_request_stores(
    config: CompressionConfig, layers: list[Any], num_requests: int
) -> RequestStores | None:
    """Stores as the options say; None without spill. Logs how much memory they may take.

    Args:
        config: the options.
        layers: vLLM's Attention layers that compact.
        num_requests: that may run at once.
    """
    if not config.spill:
        return None
    is_pinned = current_platform.is_cuda_alike()
    space = config.spill_space(is_pinned)
    entry = sum(
        layer.num_kv_heads * (layer.head_size + layer.head_size_v) * layer.dtype.itemsize
        for layer in layers
    )
    in_host, in_files = (
        f"{num_requests * number * entry / (1 << 30):.2f} GiB"
        for number in (space.host_entries, space.budget - space.host_entries)
    )
    logger.info(
        "paged_kv spills up to %d entries per sequence, layer and KV head: for %d sequences at "
        "most %s of host memory%s",
        space.budget,
        num_requests,
        in_host,
        f" and {in_files} of files in {space.directory}" if space.directory else "",
    )
    return RequestStores(space)
