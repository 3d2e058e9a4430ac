"""The last queries of each row, for policies that look at them before a compaction.

With a window of w, token t of a row lies in column t % w:

    after n = 10 tokens, w = 4    column  0  1  2  3
                                  token   8  9  6  7        `first` tells which of them were seen
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from paged_kv.policies.base import Int64s
from paged_kv.store.ragged import ragged, to_device
from paged_kv.store.row_tensor import RowTensor

Tensor = torch.Tensor


class RingWrite(NamedTuple):
    """Which tokens of a batch go where in the ring; int64 [tokens].

    Args:
        token: rising; None for all of them.
        place: row * window + column.
    """

    token: Tensor | None
    place: Tensor


class QueryRing(RowTensor):
    """[layers, rows, window, heads, head_dim], in the model's dtype.

    Args:
        num_layers: layers.
        window: how many queries of a row are kept; may be 0.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        super().__init__(num_layers)
        self.window = window

    def plan(
        self, rows: Int64s, starts: Int64s, counts: Int64s, ends: Int64s, device: torch.device
    ) -> RingWrite:
        """Where the last tokens of each sequence of a batch go.

        Args:
            rows: int64 [sequences], of the ring.
            starts: where the tokens of each begin in the batch.
            counts: tokens of each in the batch.
            ends: tokens of each after the batch.
            device: of the result.
        """
        kept = np.minimum(counts, self.window)
        sequence, offset = ragged(kept)
        back = kept[sequence] - offset  # 1 for the newest token
        token = (starts + counts)[sequence] - back
        place = rows[sequence] * self.window + (ends[sequence] - back) % self.window
        every = len(token) == counts.sum()
        return RingWrite(None if every else to_device(token, device), to_device(place, device))

    def write(self, layer: int, queries: Tensor, plan: RingWrite) -> None:
        """Stores a batch's queries [tokens, heads, head_dim] (after RoPE) in a layer."""
        token, place = plan
        new = queries[: len(place)] if token is None else queries.index_select(0, token)
        if self.tensor is None:
            self.bind((self.window, *queries.shape[1:]), queries.dtype, queries.device)
        ring = self.layer(layer)
        ring.flatten(0, 1).index_copy_(0, place, new.to(ring.dtype))

    def positions(self, num_tokens: Int64s, first: Int64s) -> Int64s:
        """int64 [sequences, window]: whose query lies in each column; -1: nobody's.

        Args:
            num_tokens: of each sequence.
            first: the first token of each whose query the ring has seen, and kept since.
        """
        newest = num_tokens[:, None] - 1
        positions = newest - (newest - np.arange(self.window)) % self.window
        return np.where((positions >= first[:, None]) & (positions >= 0), positions, -1)

    def states(self, layers: Tensor, rows: Tensor, num_kv_heads: int) -> Tensor:
        """float32 [layers, sequences, kv_heads, group, window, head_dim] of some sequences.

        Args:
            layers: int64 [layers].
            rows: int64 [sequences].
            num_kv_heads: KV heads.
        """
        assert self.tensor is not None, "no query yet"
        return grouped(self.tensor[layers[:, None], rows], num_kv_heads)


def grouped(queries: Tensor, num_kv_heads: int) -> Tensor:
    """float32 [..., kv_heads, group, queries, head_dim] of [..., queries, heads, head_dim]."""
    return queries.unflatten(-2, (num_kv_heads, -1)).float().movedim(-4, -2)
