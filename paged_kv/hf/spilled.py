"""What the rows of a cache have spilled: a store for each row and group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import numpy as np

from paged_kv.config import CompressionConfig
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore, SpillView


class SpilledRows:
    """Stores are made when something spills; rows that come from one share it until one writes.

    So do the rows of copies.

    Args:
        compression: says how much may be spilled.
        groups: indices of the layers that compact together, ascending.
    """

    def __init__(self, compression: CompressionConfig, groups: Sequence[Int64s]) -> None:
        self.compression, self.groups = compression, groups
        self._rows: list[list[SpillStore | None]] = []  # by group
        self._copies: WeakSet[SpilledRows] = WeakSet([self])  # who may share stores, this included

    def copy(self) -> SpilledRows:
        """Rows of another cache that have spilled the same."""
        other = SpilledRows(self.compression, self.groups)
        other._rows = [list(row) for row in self._rows]
        self._copies.add(other)
        other._copies = self._copies
        return other

    def add_rows(self, num_rows: int) -> None:
        """Rows that have spilled nothing, at the end."""
        self._rows += [[None] * len(self.groups) for _ in range(num_rows)]

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        self._rows = [list(self._rows[index]) for index in indices.tolist()]

    @property
    def stores(self) -> list[SpillStore]:
        """All there are; one that rows share counts once."""
        held = [store for row in self._rows for store in row if store is not None]
        return list(dict.fromkeys(held))

    def own(self, layers: Int64s, rows: Int64s, geometry: Geometry) -> None:
        """These rows are going to spill in these layers, a group: each into a store of its own."""
        group = self._group(layers)
        for row in rows.tolist():
            store = self._rows[row][group]
            if store is None:
                store = self._make(len(layers), geometry)
            elif self._num_holders(store, group) > 1:
                store = store.copy()
            self._rows[row][group] = store

    def _num_holders(self, store: SpillStore, group: int) -> int:
        """Rows that share a store."""
        rows = (row for one in self._copies for row in one._rows)
        return sum(row[group] is store for row in rows)

    def views(self, layers: Int64s, rows: Int64s) -> list[SpillView] | None:
        """What rows have on their tiers, in some layers of a group; None: nothing is spilled."""
        if not self.compression.spill:
            return None
        group = self._group(layers)
        chosen = np.searchsorted(self.groups[group], layers).tolist()
        stores = (self._rows[row][group] for row in rows.tolist())
        return [store.select(chosen) for store in stores if store is not None]

    def _group(self, layers: Int64s) -> int:
        return next(at for at, group in enumerate(self.groups) if layers[0] in group)

    def _make(self, num_layers: int, geometry: Geometry) -> SpillStore:
        config = self.compression
        is_pinned = geometry.device.type == "cuda"
        return SpillStore(
            (num_layers, geometry.num_heads),
            (geometry.key_size, geometry.value_size),
            geometry.key_dtype,
            SpillSpace(config.spill_budget, config.spill_host_budget, config.spill_dir, is_pinned),
        )
