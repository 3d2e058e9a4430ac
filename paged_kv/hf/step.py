"""The new tokens of one forward pass, and where their entries go."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.rings import CacheQueries, CacheResidual
from paged_kv.hf.tables import PageTables
from paged_kv.store.query_ring import RingWrite
from paged_kv.store.ragged import ragged, to_device
from paged_kv.store.residual_ring import Newest

Tensor = torch.Tensor


class Step:
    """A forward pass; its pages have been allocated.

    Args:
        tables: pages of every layer and row.
        size: int64 [layers, rows], entries held before.
        num_tokens: int64 [rows], tokens processed before.
        counts: int64 [rows], new tokens.
    """

    def __init__(
        self, tables: PageTables, size: Int64s, num_tokens: Int64s, counts: Int64s
    ) -> None:
        self.counts, self.tables = counts, tables
        self._size, self._num_tokens = size, num_tokens
        self.done: set[int] = set()  # layers that have stored theirs
        row, nth = ragged(counts)
        slot, page_size = size[:, row] + nth, tables.pool.page_size
        page = tables.ids[np.arange(len(size))[:, None], row, slot // page_size]
        places = page * page_size + slot % page_size
        self._device = tables.parts[0].arena.geometry.device
        # int64 [layers, tokens of all rows]: where in the arena, counted in entries
        self.places = to_device(places, self._device)
        self.queries: RingWrite | None = None  # see plan_rings
        self.newest: Newest | None = None
        self._tokens = num_tokens[row] + nth
        self._forget(self._tokens)

    def plan_rings(self, ring: CacheQueries, residual: CacheResidual) -> None:
        """Where the last queries go, and the newest entries once more, if they are kept."""
        counts, rows = self.counts, np.arange(len(self.counts))
        ends = self._num_tokens + counts
        if ring.window:
            starts = np.cumsum(counts) - counts
            self.queries = ring.plan(rows, starts, counts, ends, self._device)
        if residual.num_pages:
            self.newest = residual.plan(rows, counts, ends, residual.known, self._device)

    def _forget(self, tokens: Int64s) -> None:
        """Nothing is known of the new entries but that they hold these tokens."""
        for arena, layers in self.tables.parts:
            if arena.side:
                places = self.places[torch.from_numpy(layers)].flatten()
                positions = to_device(tokens, self._device).repeat(len(layers))
                page_size = arena.page_size
                arena.side_data.reset(places // page_size, places % page_size, positions)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores the new entries of a layer.

        Args:
            layer: index among those of the cache.
            keys: [kv_heads, tokens of all rows, head_dim].
            values: [kv_heads, tokens of all rows, size].
        """
        self.done.add(layer)
        self.tables.arena(layer).write(keys, values, self.places[layer])

    def check_done(self, layers: Int64s) -> None:
        """Raises ValueError: one of these layers of the model, all of the cache, was left out."""
        if len(self.done) < len(layers):
            raise skipped(np.delete(layers, list(self.done)).tolist())

    @cached_property
    def positions(self) -> Tensor:
        """int64 [tokens of all rows]."""
        return to_device(self._tokens, self._device)

    @cached_property
    def page_ids(self) -> Tensor:
        """int32 [layers, rows, width]: the tables, for the kernels; -1 past an end."""
        return self._int32(self.tables.ids)

    @cached_property
    def sizes(self) -> Tensor:
        """int32 [layers, rows]: entries, the new ones included."""
        return self._int32(self._size + self.counts)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [rows + 1]: where each row's new tokens begin among all."""
        return self._int32(np.concatenate([[0], np.cumsum(self.counts)]))

    def _int32(self, numbers: Int64s) -> Tensor:
        return to_device(numbers.astype(np.int32), self._device)


def skipped(layers: list[int]) -> ValueError:
    """What a cache says to a forward pass in which these layers of the model have not attended."""
    return ValueError(
        f"layers {', '.join(map(str, layers))} of this model have computed no attention in this "
        "forward pass, and a PagedCache needs every layer with full attention in each of them: "
        "LayerDrop skips some in training mode (call model.eval()), cross-attention layers are "
        "skipped without images (mllama: use DynamicCache)"
    )


def interrupted() -> ValueError:
    """What a cache says in which some layers have seen more than others."""
    return ValueError(
        "an error interrupted the last forward pass of this cache; call reset() (it gives its "
        "pages back) or use a new one"
    )
