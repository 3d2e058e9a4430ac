"""What the rows of a cache have spilled: a store for each row and group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakSet

import numpy as np
import torch

from paged_kv.config import CompressionConfig
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.policies.spill import Memo
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore, SpillView

Tensor = torch.Tensor


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has names that begin so, by the rest of them."""
    return {
        name.removeprefix(prefix): held for name, held in state.items() if name.startswith(prefix)
    }


def _memos(state: Mapping[str, Tensor], device: torch.device) -> dict[int, Memo]:
    fetched = {
        int(name): held.clone().to(device) for name, held in part_of(state, "fetched.").items()
    }
    numbers = {at: state[f"memo.{at}"].tolist() for at in fetched}
    return {at: Memo(numbers[at][0], numbers[at][1], held) for at, held in fetched.items()}


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

    def state(self) -> dict[str, Tensor]:
        """What restore takes: "rows" int64 [rows, groups], which store, or -1; and the stores."""
        stores = self.stores
        which = [[-1 if one is None else stores.index(one) for one in row] for row in self._rows]
        state = {"rows": torch.tensor(which, dtype=torch.int64)}
        for index, store in enumerate(stores):
            parts = store.state()
            for layer, memo in store.memos.items():
                parts[f"memo.{layer}"] = torch.tensor([memo.num_tokens, memo.looked])
                parts[f"fetched.{layer}"] = memo.fetched
            state |= {f"{index}.{name}": part for name, part in parts.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], geometry: Geometry) -> None:
        """Has spilled this."""
        stores: dict[int, SpillStore] = {}
        rows = state["rows"].tolist()
        self._rows = [[None] * len(self.groups) for _ in rows]
        for row, which in enumerate(rows):
            for group, index in enumerate(which):
                if index >= 0 and index not in stores:
                    stores[index] = self._make(len(self.groups[group]), geometry)
                    parts = part_of(state, f"{index}.")
                    stores[index].restore(parts)
                    stores[index].memos = _memos(parts, geometry.device)
                self._rows[row][group] = stores.get(index)

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
