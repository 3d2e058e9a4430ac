"""The residual: the newest pages of each row once more, in the model's dtype.

Every entry is written to its quantized page. While it is among the newest it also lies in a small
ring of native pages that belong to the row, and is read there; so nothing is quantized later, and
pages are shared, moved and copied as ever. With k residual pages of size p, after n tokens:

    positions   0 ................. (ceil(n / p) - k) * p ........ n
                read quantized      read from the ring: page of token t is t // p % k

What a row has not computed itself (a prefix hit) is read quantized. No compaction touches the
ring's entries: the recent window is at least as long.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from paged_kv.kernels import ops
from paged_kv.kernels.operands import Segment
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.policies.base import Int64s
from paged_kv.store.ragged import ragged, to_device
from paged_kv.store.row_tensor import RowTensor

Tensor = torch.Tensor


class Newest(NamedTuple):
    """What a batch writes to the ring, and reads there.

    Args:
        slots: int64 [tokens], where each goes; -1 for those that are not among the newest.
        counts: int32 [sequences], entries that are read from the ring.
        table: int32 [sequences, k], pages of the ring, that of the oldest entry first.
    """

    slots: Tensor
    counts: Tensor
    table: Tensor


class ResidualRing(RowTensor):
    """uint8 [layers, rows, k, kv_heads, block_bytes].

    Args:
        num_layers: layers.
        num_pages: k, newest pages of a row that are kept; may be 0.
        page_size: tokens per page.
    """

    layout: PageLayout

    def __init__(self, num_layers: int, num_pages: int, page_size: int) -> None:
        super().__init__(num_layers)
        self.num_pages, self.page_size = num_pages, page_size

    def bind_pages(self, layout: PageLayout, num_kv_heads: int, device: torch.device) -> None:
        """Takes memory for pages of a layout, in the model's dtype."""
        self.layout = layout
        self.bind((self.num_pages, num_kv_heads, layout.block_bytes), torch.uint8, device)

    def first(self, num_tokens: Int64s, known: Int64s) -> Int64s:
        """The first token of each sequence that is here; num_tokens, if none is.

        Args:
            num_tokens: of each sequence.
            known: the first token of each that the ring has seen, and kept since.
        """
        size = self.page_size
        whole = -(-known // size) * size
        newest = (-(-num_tokens // size) - self.num_pages) * size
        return np.minimum(np.maximum(newest, whole), num_tokens)

    def plan(
        self, rows: Int64s, counts: Int64s, ends: Int64s, known: Int64s, device: torch.device
    ) -> Newest:
        """What a batch of sequences writes and reads.

        Args:
            rows: int64 [sequences], of the ring.
            counts: tokens of each in the batch.
            ends: tokens of each after the batch.
            known: see first.
            device: of the result.
        """
        k, size = self.num_pages, self.page_size
        first = self.first(ends, known)
        sequence, offset = ragged(counts)
        token = (ends - counts)[sequence] + offset
        page = rows[sequence] * k + token // size % k
        slots = np.where(token >= first[sequence], page * size + token % size, -1)
        table = rows[:, None] * k + (first[:, None] // size + np.arange(k)) % k
        lengths, pages = (ends - first).astype(np.int32), table.astype(np.int32)
        return Newest(*(to_device(array, device) for array in (slots, lengths, pages)))

    def write(self, layer: int, keys: Tensor, values: Tensor, newest: Newest) -> None:
        """Stores a batch's new tokens in a layer, [tokens, kv_heads, size]; padding may follow."""
        slots = newest.slots[: len(keys)]
        new = keys[: len(slots)], values[: len(slots)]
        ops.write(self._blocks(layer), self.layout, *new, slots)

    def segment(self, layer: int, newest: Newest) -> Segment:
        """What a layer's attention reads here."""
        return Segment(self._blocks(layer), self.layout, newest.table, newest.counts)

    def entries(self, layer: int, part: str, newest: Newest) -> Tensor:
        """float32 [sequences, kv_heads, k * page_size, size] of a layer; see Newest.

        Args:
            layer: of the ring.
            part: "key" or "value".
            newest: which pages.
        """
        index = torch.zeros(1, dtype=torch.int64, device=newest.table.device)
        blocks = self._blocks(layer)[None]
        return ops.gather(blocks, self.layout, part, index, newest.table.long())[0]

    def _blocks(self, layer: int) -> Tensor:
        """uint8 [rows * k, kv_heads, block_bytes]."""
        return self.layer(layer).flatten(0, 1)
