"""The worker's side: what each step reads, and the compactions that follow it.

Per step and layer group: the metadata builder asks for shifted metadata (slots that earlier steps
emptied are skipped), the events of this step are noted, and after the forward pass the survivors
move. A policy that decides by position alone needs no more. Others get side data beside the pages,
and may observe queries in each layer's forward pass.
All decisions of when and how many are host arithmetic on numbers that vLLM keeps on the host:
nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from paged_kv.core.schedule import NEVER
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.policies.base import Events, Int64s, Policy
from paged_kv.policies.region import Compaction, Region
from paged_kv.store.compaction import compact
from paged_kv.store.holding import Holding
from paged_kv.vllm.scheduler.spec import PagedSpec
from paged_kv.vllm.worker import observation
from paged_kv.vllm.worker.observation import StepRows
from paged_kv.vllm.worker.observer import Observer
from paged_kv.vllm.worker.requests import RequestRows
from paged_kv.vllm.worker.rope import find_rotary
from paged_kv.vllm.worker.slot_movers import SlotMovers
from paged_kv.vllm.worker.spilling import RequestStores, SpillStats
from paged_kv.vllm.worker.starts import Starts
from paged_kv.vllm.worker.watching import WorkerWatch


@dataclass
class _Pending:
    """Events of one builder in this step."""

    layer_names: tuple[str, ...]
    block_table: torch.Tensor  # [rows, kernel pages]
    block_size: int  # of the kernel
    rows: Int64s  # [num_events], row of each event in block_table
    events: Events
    rated: Int64s  # [num_events], tokens whose entries have been rated
    ring: Int64s | None  # [num_events], row of each event's request in the query ring
    owners: list[Any]  # [num_events], see Holding: names of requests, if entries are spilled


class Compactor:
    """Compacts the sequences of one worker.

    Args:
        runner: vLLM's model runner (V1 or V2).
        policy: picks the survivors.
        layers: Attention layers by name (vLLM's static forward context).
        layouts: of those whose pages are packed.
        spilled: where a policy that spills has its entries.
        waits_for_pressure: as in CompressionConfig.

    Raises:
        ValueError: the policy needs the model's RoPE, and the model has no plain one.
    """

    def __init__(
        self,
        runner: Any,
        policy: Policy,
        layers: dict[str, Any],
        layouts: Mapping[str, PageLayout] | None = None,
        spilled: RequestStores | None = None,
        waits_for_pressure: bool = False,
    ) -> None:
        self.runner = runner
        self.policy = policy
        self.layers = layers
        self.layouts = layouts or {}
        self.spilled = spilled
        self.num_events = 0
        self.watch: WorkerWatch | None = None  # told of compactions
        self.positional = policy.is_positional
        self.requests = RequestRows(runner, policy.observation_window)
        self.starts = Starts(runner, waits_for_pressure)
        rotary = None
        if "rotary" in policy.reads:
            rotary = find_rotary(runner.get_model(), list(layers))
        self.observer = Observer(policy, layers, self.layouts, self.requests, spilled, rotary)
        self._in_step = False
        self._pending: list[_Pending] = []
        self._movers = SlotMovers(layers, self.layouts)

    def spill_stats(self) -> SpillStats | None:
        """What spilling came to; None: nothing is spilled."""
        return None if self.spilled is None else self.spilled.stats()

    def reset_pages(self) -> None:
        """Forgets the caches: they have been allocated anew."""
        self._movers.clear()
        self.observer.reset_pages()
        if self.spilled is not None:
            self.spilled.clear()

    @contextmanager
    def step(self, scheduler_output: Any = None) -> Iterator[None]:
        """Around the execution of a real step; compacts at its end. Dummy runs stay outside.

        Args:
            scheduler_output: may name pages to copy before the compaction, for the prefix cache.
        """
        self._in_step = True
        self._pending.clear()
        self.observer.forget_step()
        self.starts.begin_step(scheduler_output)
        if not self.positional:
            self.requests.begin_step(scheduler_output)
        try:
            yield
            if self.observer.gathering is not None:
                self.observer.gathering.end_step(scheduler_output.total_num_scheduled_tokens)
            if self.spilled is not None:
                self.spilled.update(scheduler_output)
            snapshots = getattr(scheduler_output, "paged_kv_snapshots", ())
            if snapshots:
                num_pages = self.runner.kv_cache_config.num_blocks
                copy_kv_cache_blocks_inplace(self.runner.kv_caches, num_pages, snapshots)
            number = sum(len(pending.rows) for pending in self._pending)
            self.num_events += number
            watched = nullcontext() if self.watch is None else self.watch.compactions(number)
            # Inference mode like the forward pass, in which side data is made.
            with torch.inference_mode(), watched:
                for pending in self._pending:
                    self._compact(pending)
        finally:
            self._in_step = False
            self._pending.clear()
            self.observer.forget_step()

    def begin_batch(
        self, spec: PagedSpec, layer_names: list[str], metadata: CommonAttentionMetadata
    ) -> Int64s:
        """Slots that each row has emptied so far, int64 [rows]; notes who compacts after this step.

        Args:
            spec: of the layers, with their schedule.
            layer_names: of a metadata builder.
            metadata: of the batch. For a CUDA graph vLLM pads it with rows of length 0.
        """
        emptied = np.zeros(metadata.num_reqs, dtype=np.int64)
        if not self._in_step:
            return emptied
        metadata, first, after = _without_padding(metadata)
        before = after - np.diff(first)
        # What earlier steps have freed is skipped now; what this one frees, its compaction empties:
        #
        #     slots   0      evicted       evicted_after         before      after
        #             | freed | freed soon  | stays ............. | new tokens |
        starts, fresh = self.starts.of_batch(metadata)
        evicted = spec.schedule.evicted(before, starts)
        evicted_after = spec.schedule.evicted(after, starts)
        names, ring = tuple(layer_names), None
        if not self.positional:
            # Rows of the query ring are granted before anything is noted in them.
            hits = self.requests.begin_batch(metadata)
            hits |= {int(row): int(before[row]) for row in fresh}  # nothing was noted so far
            ring = self.requests.of_batch(metadata, spec.schedule, starts, before, after)
            step = StepRows(first[:-1], after - before, after, evicted, ring)
            self.observer.note_tokens(names, metadata, step, hits, starts != NEVER)
        rows = np.flatnonzero(evicted_after > evicted)
        if rows.size:
            events = Events(evicted[rows], evicted_after[rows], after[rows])
            self._pending.append(self._events_of(spec, names, metadata, rows, events, ring))
        emptied[: len(evicted)] = evicted
        return emptied

    def _events_of(
        self,
        spec: PagedSpec,
        names: tuple[str, ...],
        metadata: CommonAttentionMetadata,
        rows: Int64s,
        events: Events,
        ring: Int64s | None,
    ) -> _Pending:
        """What is left to do after the step for some rows of the batch."""
        owners: list[Any] = rows.tolist()
        if self.spilled is not None:
            requests = self.starts.names(metadata)
            owners = [requests[row] for row in rows]
        table, ring_rows = metadata.block_table_tensor, None if ring is None else ring[rows]
        rated = spec.schedule.reached(events.evicted_before)
        return _Pending(names, table, spec.block_size, rows, events, rated, ring_rows, owners)

    def _compact(self, pending: _Pending) -> None:
        if self.positional:
            moves, table = self.policy.moves(pending.events), pending.block_table
            rows, size = pending.rows[moves.event], pending.block_size
            self._movers.move(pending.layer_names, moves, rows, table, size)
            return
        assert pending.ring is not None
        events, table = pending.events, pending.block_table
        first, end = events.evicted_before, events.num_tokens
        for store in self.observer.stores_of(pending.layer_names):
            pages = observation.page_ids(table, pending.rows, first, end, store.pages.page_size)
            holding = Holding(
                layers=np.arange(store.pages.num_layers),
                pages=pages[None],
                num_tokens=end,
                num_entries=end - first,
                num_losers=events.evicted_after - first,
                rated=np.maximum(pending.rated - first, 0),
                tail=np.zeros_like(end),  # the residual is newer than what is freed
                rows=pending.ring,
                first=self.requests.first_token[pending.ring],
                owners=pending.owners,
            )
            compact(self.policy, store, holding, "head", self.observer.facts, self._note)

    def _note(self, holding: Holding, region: Region, decided: Compaction) -> None:
        if self.spilled is not None and decided.exchanged is not None:
            self.spilled.num_fetched += len(decided.exchanged.places[0])


def _without_padding(
    metadata: CommonAttentionMetadata,
) -> tuple[CommonAttentionMetadata, Int64s, Int64s]:
    """(metadata, first tokens [rows + 1], lengths [rows]) without the rows that fill up a graph.

    Of what vLLM keeps on the host: nothing waits for the GPU.
    """
    after = metadata.seq_lens_cpu_upper_bound.numpy()[: metadata.num_reqs].astype(np.int64)
    first = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
    num_rows = int(np.count_nonzero(after))
    if num_rows == metadata.num_reqs:
        return metadata, first, after
    assert after[:num_rows].all(), "padding comes last"
    return metadata.replace(num_reqs=num_rows), first[: num_rows + 1], after[:num_rows]
