"""The residual rings of a worker's requests; see store.residual_ring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.core.page_formats import NATIVE
from paged_kv.kernels.operands import Segment
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import make_layout
from paged_kv.store.residual_ring import Newest, ResidualRing
from paged_kv.vllm.worker.requests import RequestRows

Tensor = torch.Tensor


class ResidualRings:
    """A ring for each run of equal layers; all have the same rows.

    Args:
        runner: vLLM's model runner.
        num_pages: of each request's ring in a layer.
        page_size: tokens per page.
        layers: vLLM's Attention layers with quantized pages, by name.
    """

    def __init__(self, runner: Any, num_pages: int, page_size: int, layers: dict[str, Any]) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.layers = layers
        self.layouts = {name: self._layout(layer) for name, layer in layers.items()}
        self.requests = RequestRows(runner, 0)
        self._in_step = False
        self._newest: Newest | None = None  # of the batch
        self._rings: list[tuple[ResidualRing, list[str]]] = []
        self._places: dict[str, tuple[ResidualRing, int]] = {}  # of each layer
        for _, run in groupby(layers, self._shape):
            names = list(run)
            ring = ResidualRing(len(names), num_pages, page_size)
            self._rings.append((ring, names))
            self._places |= {name: (ring, index) for index, name in enumerate(names)}

    @property
    def row_bytes(self) -> int:
        """Memory of a request's ring in all layers."""
        return self.num_pages * sum(
            layer.num_kv_heads * self.layouts[name].block_bytes
            for name, layer in self.layers.items()
        )

    @contextmanager
    def step(self, scheduler_output: Any) -> Iterator[None]:
        """Around the execution of a real step: requests come and go. Dummy runs stay outside."""
        self.requests.begin_step(scheduler_output)
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self._newest = None

    def newest(self, metadata: CommonAttentionMetadata) -> Newest | None:
        """Which entries a batch writes to the rings, and reads there; None in a dummy run.

        Args:
            metadata: of the batch, with all tokens that its rows have seen.
        """
        if not self._in_step:
            return None
        after = metadata.seq_lens_cpu_upper_bound.numpy()[: metadata.num_reqs].astype(np.int64)
        starts = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
        count = np.diff(starts)
        self.requests.begin_batch(metadata)
        rows = self.requests.rows(metadata, np.ones(len(after), dtype=bool), after - count)
        device = metadata.block_table_tensor.device
        self._make_room(device)
        known = self.requests.first_token[rows]
        ring = self._rings[0][0]
        self._newest = ring.plan(rows, count, after, known, device)
        return self._newest

    def write(self, name: str, key: Tensor, value: Tensor) -> None:
        """Stores the batch's newest tokens in a layer's ring; see PackedAttention.write."""
        if self._newest is not None:
            ring, layer = self._places[name]
            ring.write(layer, key, value, self._newest)

    def segment(self, name: str, newest: Newest) -> Segment:
        """What a layer's attention reads of the ring."""
        ring, layer = self._places[name]
        return ring.segment(layer, newest)

    def ring_rows(self, row: int) -> list[Tensor]:
        """A row of every ring, [layers, pages, kv_heads, block_bytes]."""
        return [tensor for ring, _ in self._rings for tensor in ring.row(row)]

    def _make_room(self, device: torch.device) -> None:
        """As many rows as requests have."""
        for ring, names in self._rings:
            ring.add_rows(self.requests.num_rows - ring.num_rows)
            if ring.tensor is None:
                ring.bind_pages(*self._shape(names[0]), device)

    def _shape(self, name: str) -> tuple[PageLayout, int]:
        return self.layouts[name], self.layers[name].num_kv_heads

    def _layout(self, layer: Any) -> PageLayout:
        sizes = layer.head_size, layer.head_size_v
        return make_layout(NATIVE, layer.dtype, *sizes, self.page_size)
