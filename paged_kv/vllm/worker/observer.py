"""What a policy sees besides pages: side data of their slots, and queries of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.kernels.operands import NO_SIDE, Side
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.written import ModelFacts
from paged_kv.store import query_gathering
from paged_kv.store.layers import PageStore
from paged_kv.store.query_gathering import SERVED_TOKENS, QueryGathering
from paged_kv.store.ragged import ragged, to_device
from paged_kv.vllm.worker import observation
from paged_kv.vllm.worker.layer_group import SharedSide, make_stores, row_bytes
from paged_kv.vllm.worker.observation import Observed, StepRows
from paged_kv.vllm.worker.requests import NOBODY, RequestRows
from paged_kv.vllm.worker.spilling import RequestStores

Tensor = torch.Tensor
logger = init_logger(f"vllm.{__name__}")


class Observer:
    """The stores of a worker's layers, and what each step notes in them.

    Args:
        policy: says what it reads.
        layers: Attention layers by name (vLLM's static forward context).
        layouts: of those whose pages are packed.
        requests: rows of the query ring.
        spilled: where a policy that spills has its entries.
        rotary: the model's RoPE, if the policy reads it.
    """

    def __init__(
        self,
        policy: Policy,
        layers: dict[str, Any],
        layouts: Mapping[str, PageLayout],
        requests: RequestRows,
        spilled: RequestStores | None,
        rotary: Rotary | None,
    ) -> None:
        self.policy, self.layers, self.layouts = policy, layers, layouts
        self.requests, self.spilled = requests, spilled
        statistics = query_gathering.source(policy, self._gathered)
        self.facts = ModelFacts(rotary, statistics)
        self.gathering = statistics if isinstance(statistics, QueryGathering) else None
        unsummed = any(self._kernel_decay(name) is None for name in layers)
        reads_scores = "scores" in policy.reads
        self._observes = policy.observation_window > 0 or (reads_scores and unsummed)
        self._stores: dict[tuple[str, ...], list[PageStore]] = {}
        self._side: SharedSide = {}
        self._observed: dict[str, Observed] = {}  # by layer name, in this step

    @property
    def looks_at_queries(self) -> bool:
        """Whether the forward pass must show its queries: kernels of ours add scores themselves."""
        return self._observes or self._gathers

    @property
    def _gathers(self) -> bool:
        return self.gathering is not None and not self.gathering.is_complete

    @property
    def row_bytes(self) -> int:
        """Memory of a row of the query ring, in all layers."""
        return row_bytes(list(self.layers.values()), self.policy)

    def ring_rows(self, row: int) -> list[torch.Tensor]:
        """A row of the query ring, [layers, window, heads, head_dim] of each store."""
        stores = [store for names in sorted(self._stores) for store in self._stores[names]]
        rings = [store.ring for store in stores if store.ring is not None]
        return [tensor for ring in rings for tensor in ring.row(row)]

    def stores_of(self, layer_names: tuple[str, ...]) -> list[PageStore]:
        """The stores of a metadata builder's layers; policies that go by position have none."""
        if layer_names not in self._stores:
            self._stores[layer_names] = make_stores(
                layer_names, self.layers, self.policy, self.layouts, self.spilled, self._side
            )
        return self._stores[layer_names]

    def forget_step(self) -> None:
        """No step is observed any more."""
        self._observed.clear()

    def reset_pages(self) -> None:
        """Forgets the caches: they have been allocated anew."""
        self._stores.clear()
        self._side.clear()

    def note_tokens(
        self,
        names: tuple[str, ...],
        metadata: CommonAttentionMetadata,
        step: StepRows,
        hits: dict[int, int],
        chosen: npt.NDArray[np.bool_],
    ) -> None:
        """Slots that this step writes know nothing yet, nor do those of a prefix hit.

        Args:
            names: of the layers.
            metadata: of the batch.
            step: its sequences.
            hits: slots from the first on of which nothing is known either, by batch index.
            chosen: bool [rows], sequences that can compact some time: nobody asks of the others.
        """
        table, rows = metadata.block_table_tensor, np.flatnonzero(chosen)
        if rows.size:
            self._reset(names, table, step, rows, {r: n for r, n in hits.items() if chosen[r]})
        if self.looks_at_queries or "scores" in self.policy.reads:
            self._note_queries(names, table, step, chosen)

    def _reset(
        self,
        names: tuple[str, ...],
        table: torch.Tensor,
        step: StepRows,
        rows: Int64s,
        hits: dict[int, int],
    ) -> None:
        stores = self.stores_of(names)
        size = stores[0].pages.page_size
        firsts, counts = (step.after - step.num_new)[rows], step.num_new[rows]
        if hits:  # once per request
            rows = np.append(rows, list(hits))
            counts = np.append(counts, list(hits.values()))
            firsts = np.append(firsts, np.zeros(len(hits), dtype=np.int64))
        sequence, offset = ragged(counts)
        positions = to_device(firsts[sequence] + offset, table.device)
        page = table[to_device(rows[sequence], table.device), positions // size].long()
        for store in stores:
            store.side.reset(page, positions % size, positions)

    def observe(self, layer_name: str, query: torch.Tensor, key: torch.Tensor) -> None:
        """After a layer's attention: notes its queries and keys [tokens, heads, head_dim].

        Both are after RoPE.
        """
        if layer_name not in self._observed:
            return
        observed = self._observed[layer_name]
        store, layer = observed.stores[layer_name]
        attention = self.layers[layer_name]
        size = attention.head_size
        query = query.view(len(query), -1, size)
        if getattr(attention, "query_quant", None) is not None:  # with an fp8 cache, on GPUs
            query = query.to(attention.dtype) * attention._q_scale.to(attention.dtype)
        if observed.positions is not None:
            self._gather(layer_name, query, key.view(len(key), -1, size), observed.positions)
        if observed.ring is not None and store.ring is not None:
            store.ring.write(layer, query, observed.ring)
        for batch in observed.batches:
            observation.accumulate(self.policy, store, layer, query, batch)

    def side(self, layer_name: str) -> Side:
        """What a layer's attention has to add its probabilities to, and how.

        Packed pages only: vLLM's kernels add nothing.
        """
        decay = self._kernel_decay(layer_name)
        if layer_name not in self._observed or decay is None:
            return NO_SIDE
        store, layer = self._observed[layer_name].stores[layer_name]
        return Side(scores=store.side.tensors["scores"][layer], decay=decay)

    def _note_queries(
        self,
        names: tuple[str, ...],
        table: torch.Tensor,
        step: StepRows,
        chosen: npt.NDArray[np.bool_],
    ) -> None:
        stores = self.stores_of(names)
        rings = [store.ring for store in stores if store.ring is not None]
        for ring in rings:
            ring.add_rows(self.requests.num_rows - ring.num_rows)
        write = None
        if rings and (step.ring != NOBODY).any():  # all of them have the same rows
            write = rings[0].plan(step.ring, step.start, step.num_new, step.after, table.device)
        batches: list[observation.QueryBatch] = []
        has_scores = "scores" in self.policy.reads and bool(chosen.any())
        if has_scores and self._kernel_decay(names[0]) is None:
            batches += observation.query_batches(step, chosen, table, stores[0].pages.page_size)
        places = [(store, layer) for store in stores for layer in range(store.pages.num_layers)]
        positions = None
        if self._gathers:
            row, offset = ragged(step.num_new)
            positions = to_device((step.after - step.num_new)[row] + offset, table.device)
        if write is None and positions is None and not has_scores:
            return
        observed = Observed(dict(zip(names, places, strict=True)), write, batches, positions)
        self._observed |= dict.fromkeys(names, observed)

    def _gather(self, name: str, query: Tensor, key: Tensor, positions: Tensor) -> None:
        """Statistics of a layer's queries; rows behind the batch's tokens are padding."""
        gathering, rotary, count = self.gathering, self.facts.rotary, len(positions)
        assert gathering is not None
        assert rotary is not None, "the policy reads rotary"
        index, scale = extract_layer_index(name), float(self.layers[name].impl.scale)
        gathering.add(index, query[:count], key[:count], positions, rotary, scale)

    def _gathered(self) -> None:
        logger.info(
            "paged_kv: gathered statistics of queries from the first %d tokens; from now on they "
            "stay (for better ones: paged-kv calibrate queries)",
            SERVED_TOKENS,
        )

    def _kernel_decay(self, layer_name: str) -> float | None:
        return self.policy.kernel_decay if layer_name in self.layouts else None
