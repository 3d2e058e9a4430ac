"""What owners have spilled: a store for each of them and each group of equal layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import torch

from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore

Owner = TypeVar("Owner", bound=Hashable)


class SpillShape(NamedTuple):
    """What entries of a group of layers look like.

    Args:
        shape: (layers, KV heads).
        sizes: (numbers of a key, numbers of a value).
        dtype: of the numbers.
    """

    shape: tuple[int, int]
    sizes: tuple[int, int]
    dtype: torch.dtype


class SpillStores(Generic[Owner]):
    """Stores that are made when somebody first spills.

    Args:
        space: of each store.
    """

    def __init__(self, space: SpillSpace) -> None:
        self.space = space
        self._stores: defaultdict[Owner, dict[Hashable, SpillStore]] = defaultdict(dict)

    def of(self, owner: Owner, group: Hashable, shape: SpillShape) -> SpillStore:
        """An owner's store for a group of layers; a new one is empty."""
        stores = self._stores[owner]
        if group not in stores:
            stores[group] = SpillStore(*shape, self.space)
        return stores[group]

    @property
    def stores(self) -> list[SpillStore]:
        """All there are; one that owners share counts once."""
        every = (store for stores in self._stores.values() for store in stores.values())
        return list(dict.fromkeys(every))

    @property
    def num_entries(self) -> int:
        """On lower tiers now: those of one KV head of one layer."""
        return sum(store.num_entries * store.shape[1] for store in self.stores)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Memory taken, by tier: host and mmap."""
        sizes = [store.num_bytes for store in self.stores]
        return {tier: sum(size[tier] for size in sizes) for tier in ("host", "mmap")}
