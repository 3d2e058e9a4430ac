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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Events, Int64s, Policy
from paged_kv.policies.region import Compaction, Region
from paged_kv.store.compaction import compact
from paged_kv.store.holding import Holding
from paged_kv.store.layers import PageStore
from paged_kv.store.ragged import ragged
from paged_kv.vllm.scheduler.spec import PagedSpec
from paged_kv.vllm.worker import observation
from paged_kv.vllm.worker.block_table import skip
from paged_kv.vllm.worker.layer_group import make_stores, row_bytes
from paged_kv.vllm.worker.observation import Observed, StepRows
from paged_kv.vllm.worker.requests import RequestRows
from paged_kv.vllm.worker.rope import find_rotary
from paged_kv.vllm.worker.slot_movers import SlotMovers
from paged_kv.vllm.worker.spilling import RequestStores, SpillStats


@dataclass
class _Pending:
    """Events of one builder in this step."""

    layer_names: tuple[str, ...]
    block_table: torch.Tensor  # [rows, kernel pages]
    block_size: int  # of the kernel
    rows: Int64s  # [num_events], row of each event in block_table
    events: Events
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
    ) -> None:
        self.runner = runner
        self.policy = policy
        self.layers = layers
        self.layouts = layouts or {}
        self.spilled = spilled
        self.num_events = 0
        self.positional = policy.is_positional
        self.requests = RequestRows(runner, policy.observation_window)
        self.rotary: Rotary | None = None
        if "rotary" in policy.reads:
            self.rotary = find_rotary(runner.get_model(), list(layers))
        self._in_step = False
        self._pending: list[_Pending] = []
        self._observed: dict[str, Observed] = {}  # by layer name
        self._movers = SlotMovers(layers, self.layouts)
        self._stores: dict[tuple[str, ...], list[PageStore]] = {}

    @property
    def observes(self) -> bool:
        """Whether the forward pass must show its queries."""
        return self.policy.observation_window > 0 or "scores" in self.policy.reads

    @property
    def row_bytes(self) -> int:
        """Memory of a row of the query ring, in all layers."""
        return row_bytes(list(self.layers.values()), self.policy)

    def ring_rows(self, row: int) -> list[torch.Tensor]:
        """A row of the query ring, [layers, window, heads, head_dim] of each store."""
        stores = [store for names in sorted(self._stores) for store in self._stores[names]]
        rings = [store.ring for store in stores if store.ring is not None]
        return [tensor for ring in rings for tensor in ring.row(row)]

    def spill_stats(self) -> SpillStats | None:
        """What spilling came to; None: nothing is spilled."""
        return None if self.spilled is None else self.spilled.stats()

    def reset_pages(self) -> None:
        """Forgets the caches: they have been allocated anew."""
        self._movers.clear()
        self._stores.clear()
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
        self._observed.clear()
        if not self.positional:
            self.requests.begin_step(scheduler_output)
        try:
            yield
            if self.spilled is not None:
                self.spilled.update(scheduler_output)
            snapshots = getattr(scheduler_output, "paged_kv_snapshots", ())
            if snapshots:
                num_pages = self.runner.kv_cache_config.num_blocks
                copy_kv_cache_blocks_inplace(self.runner.kv_caches, num_pages, snapshots)
            with torch.inference_mode():  # like the forward pass, in which side data is made
                for pending in self._pending:
                    self.num_events += len(pending.rows)
                    self._compact(pending)
        finally:
            self._in_step = False
            self._pending.clear()
            self._observed.clear()

    def shift(
        self, spec: PagedSpec, layer_names: list[str], metadata: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The metadata of what is left of each sequence; notes who compacts after this step."""
        if not self._in_step:
            return metadata
        # Lengths that vLLM keeps on the host: nothing waits for the GPU.
        after = metadata.seq_lens_cpu_upper_bound.numpy()[: metadata.num_reqs].astype(np.int64)
        starts = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
        before = after - np.diff(starts)
        # What earlier steps have freed is skipped now; what this one frees, its compaction empties:
        #
        #     slots   0      evicted       evicted_after         before      after
        #             | freed | freed soon  | stays ............. | new tokens |
        prompt_lens = self.requests.prompt_lens(metadata)
        evicted = spec.schedule.evicted(before, prompt_lens)
        evicted_after = spec.schedule.evicted(after, prompt_lens)
        names, ring = tuple(layer_names), None
        if not self.positional:
            # Rows of the query ring are granted before anything is noted in them.
            hits = self.requests.begin_batch(metadata)
            lens = (prompt_lens, before, after)
            ring = self.requests.of_batch(metadata, spec.schedule, *lens)
            step = StepRows(starts[:-1], after - before, after, evicted, ring)
            self._note_tokens(names, metadata, step, hits)
        rows = np.flatnonzero(evicted_after > evicted)
        if rows.size:
            events = Events(evicted[rows], evicted_after[rows], after[rows])
            self._pending.append(self._events_of(spec, names, metadata, rows, events, ring))
        return skip(metadata, evicted, spec.block_size) if evicted.any() else metadata

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
            owners = self.requests.names(metadata, rows)
        table, ring_rows = metadata.block_table_tensor, None if ring is None else ring[rows]
        return _Pending(names, table, spec.block_size, rows, events, ring_rows, owners)

    def observe(self, layer_name: str, query: torch.Tensor) -> None:
        """After a layer's attention: notes its queries [tokens, heads, head_dim], after RoPE."""
        if layer_name not in self._observed:
            return
        observed = self._observed[layer_name]
        store, layer = observed.stores[layer_name]
        query = query.view(len(query), -1, self.layers[layer_name].head_size)
        if observed.ring is not None and store.ring is not None:
            store.ring.write(layer, query, observed.ring)
        for batch in observed.batches:
            observation.accumulate(self.policy, store, layer, query, batch)

    def scores(self, layer_name: str) -> torch.Tensor | None:
        """Where a layer's attention has to add its probabilities, [pages, kv_heads, page_size].

        None if it need not. Packed pages only: vLLM's kernels add nothing.
        """
        if layer_name not in self._observed or not self._summed(layer_name):
            return None
        store, layer = self._observed[layer_name].stores[layer_name]
        return store.side.tensors["scores"][layer]

    def _summed(self, layer_name: str) -> bool:
        return self.policy.sums_attention and layer_name in self.layouts

    def _note_tokens(
        self,
        names: tuple[str, ...],
        metadata: CommonAttentionMetadata,
        step: StepRows,
        hits: dict[int, int],
    ) -> None:
        """Slots that this step writes know nothing yet, nor do those of a prefix hit."""
        table = metadata.block_table_tensor
        stores = self.stores_of(names)
        size = stores[0].pages.page_size
        rows, firsts, counts = np.arange(len(step.start)), step.after - step.num_new, step.num_new
        if hits:  # once per request
            rows = np.append(rows, list(hits))
            counts = np.append(counts, list(hits.values()))
            firsts = np.append(firsts, np.zeros(len(hits), dtype=np.int64))
        sequence, offset = ragged(counts)
        positions = torch.from_numpy(firsts[sequence] + offset).to(table.device)
        page = table[torch.from_numpy(rows[sequence]).to(table.device), positions // size].long()
        for store in stores:
            store.side.reset(page, positions % size, positions)
        if self.observes:
            self._note_queries(names, table, step)

    def _note_queries(self, names: tuple[str, ...], table: torch.Tensor, step: StepRows) -> None:
        stores = self.stores_of(names)
        rings = [store.ring for store in stores if store.ring is not None]
        for ring in rings:
            ring.add_rows(self.requests.num_rows - ring.num_rows)
        write = None
        if rings:  # all of them have the same rows
            write = rings[0].plan(step.ring, step.start, step.num_new, step.after, table.device)
        batches: list[observation.QueryBatch] = []
        if "scores" in self.policy.reads and not self._summed(names[0]):
            batches += observation.query_batches(step, table, stores[0].pages.page_size)
        places = [(store, layer) for store in stores for layer in range(store.pages.num_layers)]
        observed = Observed(dict(zip(names, places, strict=True)), write, batches)
        self._observed |= dict.fromkeys(names, observed)

    def _compact(self, pending: _Pending) -> None:
        if self.positional:
            moves, table = self.policy.moves(pending.events), pending.block_table
            rows, size = pending.rows[moves.event], pending.block_size
            self._movers.move(pending.layer_names, moves, rows, table, size)
            return
        assert pending.ring is not None
        events, table = pending.events, pending.block_table
        first, end = events.evicted_before, events.num_tokens
        for store in self.stores_of(pending.layer_names):
            pages = observation.page_ids(table, pending.rows, first, end, store.pages.page_size)
            holding = Holding(
                layers=np.arange(store.pages.num_layers),
                pages=pages[None],
                num_tokens=end,
                num_entries=end - first,
                num_losers=events.evicted_after - first,
                tail=np.zeros_like(end),  # the residual is newer than what is freed
                rows=pending.ring,
                first=self.requests.first_token[pending.ring],
                owners=pending.owners,
            )
            compact(self.policy, store, holding, "head", self.rotary, self._note)

    def _note(self, holding: Holding, region: Region, decided: Compaction) -> None:
        if self.spilled is not None and decided.exchanged is not None:
            self.spilled.num_fetched += len(decided.exchanged.places[0])

    def stores_of(self, layer_names: tuple[str, ...]) -> list[PageStore]:
        """The stores of a metadata builder's layers; policies that go by position have none."""
        if layer_names not in self._stores:
            self._stores[layer_names] = make_stores(
                layer_names, self.layers, self.policy, self.layouts, self.spilled
            )
        return self._stores[layer_names]
