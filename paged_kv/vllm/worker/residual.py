"""The residual: the newest pages of each request once more, in the model's dtype.

Every entry is written to its quantized page. While it is among the newest it also lies in a small
ring of native pages that belong to the request, and is read there; so nothing is quantized later,
and pages are shared, moved and copied as ever. With k residual pages of size p, after n tokens:

    positions   0 ................. (ceil(n / p) - k) * p ........ n
                read quantized      read from the ring: page of token t is t // p % k

What a request has not computed itself (a prefix hit) is read quantized. No compaction touches the
ring's entries: the recent window is at least as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from paged_kv.core.page_formats import NATIVE
from paged_kv.kernels import ops
from paged_kv.kernels.operands import Segment
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import make_layout
from paged_kv.vllm.worker.observation import ragged
from paged_kv.vllm.worker.requests import RequestRows

Tensor = torch.Tensor


class Newest(NamedTuple):
    """What a batch reads from the ring.

    Args:
        counts_before: int32 [rows], entries that are read from the quantized pages.
        counts: int32 [rows], entries that are read from the ring.
        table: int32 [rows, k], pages of the ring, that of the oldest entry first.
    """

    counts_before: Tensor
    counts: Tensor
    table: Tensor


class Residual:
    """The rings of a worker's requests.

    Args:
        runner: vLLM's model runner.
        num_pages: of each request's ring in a layer, k.
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
        self._slots: Tensor | None = None  # of the batch's tokens, in the ring
        self._rings: dict[str, Tensor] = {}  # uint8 [rows * k, kv_heads, block_bytes]

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
            self._slots = None

    def newest(self, metadata: CommonAttentionMetadata, held: Tensor) -> Newest | None:
        """Which entries the batch reads, and writes, in the ring.

        Args:
            metadata: of the batch, with all tokens that its rows have seen.
            held: int32 [rows], entries that each row holds.
        """
        if not self._in_step:
            return None
        k, size = self.num_pages, self.page_size
        after = metadata.seq_lens_cpu_upper_bound.numpy()[: metadata.num_reqs].astype(np.int64)
        starts = metadata.query_start_loc_cpu.numpy()[: metadata.num_reqs + 1].astype(np.int64)
        count = np.diff(starts)
        self.requests.hits(metadata)
        rows = self.requests.rows(metadata, np.ones(len(after), dtype=bool), after - count)
        own = -(-self.requests.first_token[rows] // size) * size
        first = np.minimum(np.maximum((-(-after // size) - k) * size, own), after)
        sequence, offset = ragged(count)
        token = (after - count)[sequence] + offset
        page = rows[sequence] * k + token // size % k
        slots = np.where(token >= first[sequence], page * size + token % size, -1)
        self._slots = torch.from_numpy(slots)
        table = rows[:, None] * k + (first[:, None] // size + np.arange(k)) % k
        counts = torch.from_numpy((after - first).astype(np.int32))
        return Newest(held - counts, counts, torch.from_numpy(table.astype(np.int32)))

    def write(self, name: str, key: Tensor, value: Tensor) -> None:
        """Stores the batch's newest tokens in a layer's ring; see PackedAttention.write."""
        if self._slots is not None:
            slots = self._slots[: len(key)]
            new = key[: len(slots)], value[: len(slots)]
            ops.write(self._ring(name), self.layouts[name], *new, slots)

    def segment(self, name: str, newest: Newest) -> Segment:
        """What a layer's attention reads of the ring."""
        return Segment(self._ring(name), self.layouts[name], newest.table, newest.counts)

    def ring_rows(self, row: int) -> list[Tensor]:
        """A row's pages in the ring of every layer."""
        pages = slice(row * self.num_pages, (row + 1) * self.num_pages)
        return [self._ring(name)[pages] for name in self.layers]

    def _ring(self, name: str) -> Tensor:
        """A layer's ring; grows with the rows."""
        num_pages = self.requests.num_rows * self.num_pages
        ring = self._rings.get(name)
        if ring is None or len(ring) < num_pages:
            shape = (num_pages, self.layers[name].num_kv_heads, self.layouts[name].block_bytes)
            new = torch.zeros(shape, dtype=torch.uint8)
            if ring is not None:
                new[: len(ring)] = ring
            ring = self._rings[name] = new
        return ring

    def _layout(self, layer: Any) -> PageLayout:
        sizes = layer.head_size, layer.head_size_v
        return make_layout(NATIVE, layer.dtype, *sizes, self.page_size)
