"""Entries that compactions spilled: a store for each running request and stack of equal layers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from paged_kv.config import CompressionConfig
from paged_kv.tiers.spill_store import SpillSpace, SpillStore
from paged_kv.vllm.layer_group import Stack

logger = init_logger(f"vllm.{__name__}")


class Spilled:
    """The stores of one worker.

    A request gets its stores at its first compaction. They end with the request, and when it is
    preempted: recomputing it spills anew. Whoever keeps the pages of a preempted request says so
    (`keep`); then its stores wait, too.

    Args:
        space: of each store.
    """

    def __init__(self, space: SpillSpace) -> None:
        self.space = space
        self._stores: defaultdict[str, dict[int, SpillStore]] = defaultdict(dict)  # by id of Stack
        self._kept: set[str] = set()

    def update(self, scheduler_output: Any) -> None:
        """Requests have come and gone in this step; before its compactions."""
        resumed = set(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
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
            store.close()

    def clear(self) -> None:
        """Drops everything."""
        for request in list(self._stores):
            self.drop(request)

    def of(self, requests: list[str], stack: Stack) -> list[SpillStore]:
        """Stores of some requests for the layers of a stack; new ones are empty."""
        return [self._of(request, stack) for request in requests]

    def _of(self, request: str, stack: Stack) -> SpillStore:
        stores = self._stores[request]
        if id(stack) not in stores:
            pages = stack.pages
            shape = pages.num_layers, pages.num_heads
            sizes = pages.keys.size, pages.values.size
            stores[id(stack)] = SpillStore(shape, sizes, stack.dtype, self.space)
        return stores[id(stack)]


def make_spilled(config: CompressionConfig, layers: list[Any], num_requests: int) -> Spilled | None:
    """Stores as the options say; None without spill. Logs how much memory they may take.

    Args:
        config: the options.
        layers: vLLM's Attention layers that compact.
        num_requests: that may run at once.
    """
    if not config.spill:
        return None
    is_pinned = current_platform.is_cuda_alike()
    space = SpillSpace(config.spill_budget, config.spill_host_budget, config.spill_dir, is_pinned)
    entry = sum(
        layer.num_kv_heads * (layer.head_size + layer.head_size_v) * layer.dtype.itemsize
        for layer in layers
    )
    in_host, in_files = (
        f"{num_requests * number * entry / (1 << 30):.2f} GiB"
        for number in (space.host_entries, space.budget - space.host_entries)
    )
    logger.info(
        "paged_kv spills up to %d entries per sequence, layer and KV head: for %d sequences at most "
        "%s of host memory%s",
        space.budget,
        num_requests,
        in_host,
        f" and {in_files} of files in {space.directory}" if space.directory else "",
    )
    return Spilled(space)
