"""The swap as a KV connector of vLLM: the scheduler's side decides, the worker's side copies.

vLLM has no hook for a preemption, and a victim's pages can be given away inside the same
schedule(): our scheduler tells the connector before it frees them (see scheduler.py), and the
worker saves them before it does anything else in that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from paged_kv.core.schedule import cdiv
from paged_kv.vllm.swap import metrics
from paged_kv.vllm.swap.commands import Capacity, Finished, SwapMetadata
from paged_kv.vllm.swap.copier import Copier
from paged_kv.vllm.swap.ledger import RESET, STALE, Ledger
from paged_kv.vllm.swap.needs import Compressed


class SwapConnector(KVConnectorBase_V1, SupportsHMA):
    """Host and file tiers for preempted requests; see KVConnectorBase_V1 for the methods."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.ledger: Ledger | None = None
        self.copier: Copier | None = None
        self._meter = metrics.Meter()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what we save."""
        return False

    # The scheduler's side.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The workers have made their tiers; the smallest counts.

        vLLM 0.33 says it again when an engine wakes up: what is there is still there.
        """
        ranks: list[Capacity] = list(metadata.values())
        names = ("slot_bytes", "host_slots", "file_slots", "ring_slots")
        by_name = {name: [getattr(rank, name) for rank in ranks] for name in names}
        assert len(set(by_name["slot_bytes"])) == len(set(by_name["ring_slots"])) == 1
        capacity = Capacity(**{n: min(v) for n, v in by_name.items()})
        if self.ledger is None or (self.ledger.capacity, self.ledger.num_ranks) != (
            capacity,
            len(ranks),
        ):
            self.ledger = Ledger(capacity, len(ranks))

    def swap_out(self, request: Any) -> None:
        """A request is being preempted and still has its pages.

        Steps in flight will have run before the pages are saved, so that the request has all
        tokens that were scheduled, and only the pages that their compactions leave.
        """
        num_tokens = request.num_computed_tokens
        if self.ledger is None or not num_tokens:
            return
        request_id = request.request_id
        pages = []
        for manager in self._managers:
            first = self._evicted(manager, request, num_tokens) // manager.block_size
            blocks = manager.req_to_blocks.get(request_id, [])
            last = cdiv(num_tokens, manager.block_size)
            page_ids = _page_ids(blocks, first, last)
            # Under priorities a victim may have got copies of shared pages in this very schedule().
            # They are made after the save: until then the content is where it comes from.
            source = {c.block_id: s.block_id for s, c in manager._pending_cow_copies}
            pages.append({index: source.get(page, page) for index, page in page_ids.items()})
        self.ledger.save(request_id, num_tokens, pages)

    def restorable(self, request: Any) -> int:
        """Tokens that a waiting request can get back; 0 if it must be computed.

        Output that vLLM has thrown away (reset_prefix_cache) is cut off, unless the entries of
        that moment are gone: later tokens have caused a compaction, or count in scores.
        """
        if self.ledger is None:
            return 0
        swapped = self.ledger.swapped.get(request.request_id)
        if swapped is None:
            return 0
        saved = swapped.num_tokens
        num_tokens = min(saved, request.num_tokens - 1)
        if num_tokens < saved and self._has_changed(request, num_tokens, saved):
            self.ledger.drop(request.request_id, STALE)
            return 0
        return num_tokens

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond the local prefix hit; None while they are on their way from the file."""
        num_tokens = self.restorable(request)
        if num_tokens <= num_computed_tokens:
            return 0, False
        assert self.ledger is not None
        if self.ledger.swapped[request.request_id].is_loadable:
            return num_tokens - num_computed_tokens, False
        if self.ledger.promote(request.request_id):
            return None, False
        for manager in self._managers:  # they were told that it comes back: it begins anew
            if isinstance(manager, Compressed):
                manager.forget_restored(request.request_id)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request is admitted: its new pages are loaded, or its swapped ones not needed."""
        request_id = request.request_id
        if self.ledger is None or request_id not in self.ledger.swapped:
            return
        if not num_external_tokens:
            covered = self.restorable(request) and not request.skip_reading_prefix_cache
            if request_id in self.ledger.swapped:
                self.ledger.drop(request_id, None if covered else STALE)
            return
        num_tokens = self.restorable(request)
        pages = []
        for manager, new_blocks in zip(self._managers, blocks.blocks, strict=True):
            first = (num_tokens - num_external_tokens) // manager.block_size
            pages.append(_page_ids(new_blocks, first, cdiv(num_tokens, manager.block_size)))
        self.ledger.load(request_id, pages, num_tokens, num_external_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All: they are the request's own pages."""
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step's commands."""
        return SwapMetadata(self.ledger.end_step() if self.ledger is not None else [])

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers' background work has come to."""
        finished = connector_output.kv_connector_worker_meta
        if isinstance(finished, Finished) and self.ledger is not None:
            self.ledger.finish(finished)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ends; it may be a swapped one that is aborted."""
        if self.ledger is not None and request.request_id in self.ledger.swapped:
            self.ledger.drop(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Forgets what is swapped, as after new weights: it is computed again."""
        if self.ledger is not None:
            for request_id in list(self.ledger.swapped):
                self.ledger.drop(request_id, RESET)
        return True

    @property
    def _managers(self) -> Any:
        assert self._kv_cache_manager is not None
        return self._kv_cache_manager.coordinator.single_type_managers

    def _evicted(self, manager: Any, request: Any, num_tokens: int) -> int:
        if not isinstance(manager, Compressed):
            return 0
        return manager.evicted(request.request_id, num_tokens)

    def _has_changed(self, request: Any, earlier: int, later: int) -> bool:
        return any(
            manager.has_scores(request.request_id)
            or self._evicted(manager, request, earlier) != self._evicted(manager, request, later)
            for manager in self._managers
            if isinstance(manager, Compressed)
        )

    # The worker's side.

    def bind_copier(self, copier: Copier) -> None:
        """The worker has its caches.

        Raises:
            RuntimeError: an engine that lives in this process has a connector already.
        """
        if self.copier is not None:
            raise RuntimeError(
                "kv-swap-space: another engine of this process swaps, and vLLM has one KV "
                "connector per process: shut that engine down first"
            )
        self.copier = copier

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What this worker's tiers hold."""
        return None if self.copier is None else self.copier.capacity

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Saves pages. Our worker calls it before vLLM does, which is too late in its V2 runner."""
        assert isinstance(kv_connector_metadata, SwapMetadata)
        if self.copier is not None and not kv_connector_metadata.begun:
            kv_connector_metadata.begun = True
            self.copier.begin_step(kv_connector_metadata.commands)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Restores pages, before the forward pass."""
        if self.copier is not None:
            self.copier.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete, or in stream order, when the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any) -> None:
        """Nothing is saved while a request runs."""

    def wait_for_save(self) -> None:
        """Nothing is saved while a request runs."""

    def build_connector_worker_meta(self) -> Finished | None:
        """What the background work has come to."""
        return None if self.copier is None else self.copier.finished()

    def shutdown(self) -> None:
        """Gives the tiers back."""
        if self.copier is not None:
            self.copier.close()
            self.copier = None

    # Metrics.

    def get_kv_connector_stats(self) -> Any:
        """What the scheduler's side has counted since it was asked last."""
        if self.ledger is None:
            return None
        return self._meter.read(self.ledger.counts, self.ledger.used)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """What was counted, as vLLM adds it up."""
        return metrics.SwapStats(data=data) if data is not None else metrics.SwapStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> Any:
        """The metrics that vLLM exports."""
        return metrics.SwapPromMetrics(*args)


def _page_ids(blocks: Sequence[Any], first: int, last: int) -> dict[int, int]:
    """Page ids by logical index, of the pages from first up to last that are not given back."""
    pages = enumerate(blocks[first:last], first)
    return {index: block.block_id for index, block in pages if not block.is_null}
