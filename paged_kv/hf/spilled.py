"""What the rows of a cache have spilled: stores that rows share until one of them writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakSet

import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.policies.tier import Memo
from paged_kv.store.spill_stores import SpillShape, SpillStores
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore

Tensor = torch.Tensor


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has names that begin so, by the rest of them."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _memos(state: Mapping[str, Tensor], device: torch.device) -> dict[int, Memo]:
    fetched = {
        int(name): tensor.clone().to(device) for name, tensor in part_of(state, "fetched.").items()
    }
    numbers = {at: state[f"memo.{at}"].tolist() for at in fetched}
    return {at: Memo(numbers[at][0], numbers[at][1], tensor) for at, tensor in fetched.items()}


class RowStores(SpillStores[int]):
    """The stores of a cache's rows; rows that come from one share it until one writes.

    So do the rows of copies. Groups are those of the layers, by index.

    Args:
        space: of each store.
        groups: indices of the layers that compact together, ascending.
    """

    def __init__(self, space: SpillSpace, groups: Sequence[Int64s]) -> None:
        super().__init__(space)
        self.groups = groups
        self._copies: WeakSet[RowStores] = WeakSet([self])  # who may share stores, this included

    def copy(self) -> RowStores:
        """Rows of another cache that have spilled the same."""
        other = RowStores(self.space, self.groups)
        other._stores.update({row: dict(stores) for row, stores in self._stores.items()})
        self._copies.add(other)
        other._copies = self._copies
        return other

    def add_rows(self, num_rows: int) -> None:
        """Rows that have spilled nothing, at the end."""

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        stores = {row: dict(self._stores[index]) for row, index in enumerate(indices.tolist())}
        self._stores.clear()
        self._stores.update(stores)

    def own(self, group: int, rows: Int64s, geometry: Geometry) -> None:
        """These rows are going to spill in a group of layers: each into a store of its own."""
        for row in rows.tolist():
            store = self.of(row, group, self.shape(group, geometry))
            if self._num_holders(store, group) > 1:
                self._stores[row][group] = store.copy()

    def shape(self, group: int, geometry: Geometry) -> SpillShape:
        """What the entries of a group look like."""
        return SpillShape(
            (len(self.groups[group]), geometry.num_heads),
            (geometry.key_size, geometry.value_size),
            geometry.key_dtype,
        )

    def state(self, num_rows: int) -> dict[str, Tensor]:
        """What restore takes: "rows" int64 [rows, groups], which store, or -1; and the stores."""
        stores, groups = self.stores, range(len(self.groups))
        index = {id(store): at for at, store in enumerate(stores)}
        which = [
            [index.get(id(self._stores[row].get(group)), -1) for group in groups]
            for row in range(num_rows)
        ]
        state = {"rows": torch.tensor(which, dtype=torch.int64)}
        for at, store in enumerate(stores):
            parts = store.state()
            for layer, memo in store.memos.items():
                parts[f"memo.{layer}"] = torch.tensor([memo.num_tokens, memo.looked])
                parts[f"fetched.{layer}"] = memo.fetched
            state |= {f"{at}.{name}": part for name, part in parts.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], geometry: Geometry) -> None:
        """Has spilled this."""
        stores: dict[int, SpillStore] = {}
        for row, which in enumerate(state["rows"].tolist()):
            for group, index in enumerate(which):
                if index < 0:
                    continue
                if index not in stores:
                    stores[index] = self.of(row, group, self.shape(group, geometry))
                    parts = part_of(state, f"{index}.")
                    stores[index].restore(parts)
                    stores[index].memos = _memos(parts, geometry.device)
                self._stores[row][group] = stores[index]

    def _num_holders(self, store: SpillStore, group: int) -> int:
        """Rows that share a store."""
        rows = (stores for copy in self._copies for stores in copy._stores.values())
        return sum(stores.get(group) is store for stores in rows)
