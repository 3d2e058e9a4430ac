"""What one sequence has spilled, and what arrives there in the background.

Whoever reads waits for what is under way. Entries that are not held any more make room for others;
where there is none left, the least important are lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial

import torch

from paged_kv.policies.tier import Memo, Places, Spilled
from paged_kv.tiers import spill_places
from paged_kv.tiers.page_bounds import PAGE_SIZE, PageBounds, grown
from paged_kv.tiers.spill_memory import SpillMemory, SpillSpace

Tensor = torch.Tensor
_SMALL = {
    "positions": torch.int32,
    "importance": torch.float32,
    "scores": torch.float32,
    "ratings": torch.float32,
}


class SpillStore:
    """Entries of one sequence in layers of equal shape, equally many in each KV head of a layer.

    Args:
        shape: (layers, KV heads).
        sizes: (numbers of a key, numbers of a value).
        dtype: of the numbers.
        space: how much, and where.
    """

    def __init__(
        self, shape: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, space: SpillSpace
    ) -> None:
        self.shape, self.sizes, self.dtype, self.space = shape, sizes, dtype, space
        self._work: list[tuple[set[int], Future[None]]] = []  # what arrives in which layers
        self.close()

    def close(self) -> None:
        """Gives memory and files back; nothing is held any more."""
        self.wait()
        self.counts = [0] * self.shape[0]  # entries by layer
        names = dict(zip(("keys", "values"), self.sizes, strict=True))
        self._memory = SpillMemory(self.shape, names, self.dtype, self.space)
        self._small: dict[str, Tensor] = {}  # [layers, kv_heads, capacity] by name
        self._bounds = PageBounds(self.shape, self.sizes[0], self.dtype)
        self._num_lost = 0
        self._known_bytes = {"host": 0, "mmap": 0}
        self.memos: dict[int, Memo] = {}  # by layer; of that layer alone

    def select(self, layers: Sequence[int]) -> SpillView:
        """Some layers, of equally many entries, as a policy sees them."""
        return SpillView(self, torch.tensor(layers))

    @property
    def num_entries(self) -> int:
        """Over all layers; one in each KV head counts once."""
        self.wait()
        return sum(self.counts)

    @property
    def num_lost(self) -> int:
        """Entries for which there was no room, counted in the same way."""
        self.wait()
        return self._num_lost

    @property
    def num_bytes(self) -> dict[str, int]:
        """Memory taken, by tier: host and mmap."""
        self.wait()
        host, mmap = self._memory.num_bytes
        small = sum(tensor.nbytes for tensor in self._small.values())
        self._known_bytes = {"host": host + small + self._bounds.num_bytes, "mmap": mmap}
        return self._known_bytes

    @property
    def known_bytes(self) -> dict[str, int]:
        """num_bytes without waiting: while something is on its way, what it was before."""
        arrived = all(arrival.done() for _, arrival in self._work)
        return self.num_bytes if arrived else self._known_bytes

    def copy(self) -> SpillStore:
        """One with the same entries; with the most important, if there is no room for all."""
        other = SpillStore(self.shape, self.sizes, self.dtype, self.space)
        other.restore(self.state())
        other.memos = dict(self.memos)
        return other

    def state(self) -> dict[str, Tensor]:
        """The entries, each in its slot, [layers, kv_heads, slots, ...], and "counts" [layers]."""
        self.wait()
        layer, head = (torch.arange(size) for size in self.shape)
        places = layer[:, None, None], head[:, None], torch.arange(max(self.counts))
        names = ["keys", "values", *self._small] if any(self.counts) else []
        state = {name: self.take(name, places) for name in names}
        state["counts"] = torch.tensor(self.counts)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Holds these entries; the most important of them, if there is no room for all."""
        counts = state["counts"].tolist()
        names = {"keys", "values", *_SMALL} & set(state)
        nothing = torch.zeros(0, dtype=torch.int64)
        for count in set(counts) - {0}:
            layers = torch.tensor([layer for layer, n in enumerate(counts) if n == count])
            row = torch.arange(len(layers) * self.shape[1]).repeat_interleave(count)
            content = {name: state[name][layers, :, :count].flatten(0, 2) for name in names}
            self.arrive(layers, (nothing, nothing, nothing), row, content)

    def read(self, name: str, places: Places) -> Tensor:
        """Keys or values [..., size], positions or scores [...]; layers are those of the store."""
        self.wait()
        return self.take(name, places)

    def take(self, name: str, places: Places) -> Tensor:
        """The same of layers that nobody writes to (see wait); others may grow meanwhile."""
        layer, head, slot = torch.broadcast_tensors(*places)
        if name in _SMALL:
            # Not _side: that is for the thread that writes.
            return self._side_as_is(name)[layer, head, slot]
        return self._memory.read(name, layer * self.shape[1] + head, slot)

    def bounds(self, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest number in each channel of the pages of layers that hold as much.

        Nobody writes to these layers, see wait.
        """
        return self._bounds.read(layers, self.counts[int(layers[0])])

    def count(self, layers: Tensor) -> int:
        """Entries of each of these layers, which hold equally many."""
        chosen = set(layers.tolist())
        self.wait(chosen)
        counts = {self.counts[layer] for layer in chosen}
        assert len(counts) == 1, "these layers do not hold equally many entries"
        return counts.pop()

    def wait(self, layers: set[int] | None = None) -> None:
        """Until what was given to some layers, or to all, has arrived; raises what went wrong."""
        awaited = [work for work in self._work if layers is None or work[0] & layers]
        self._work = [work for work in self._work if work not in awaited]
        for _, arrival in awaited:
            arrival.result()

    def submit(self, layers: Tensor, taken: Places, spilled: Spilled) -> None:
        """exchange of a view, in the background."""
        ready = None
        if spilled.row.is_cuda:  # what is given may still be in the making
            ready = torch.cuda.Event()
            ready.record()
        work = _executor().submit(self._receive, layers, taken, spilled, ready)
        self._work.append((set(layers.tolist()), work))

    @torch.no_grad()
    def _receive(
        self, layers: Tensor, taken: Places, spilled: Spilled, ready: torch.cuda.Event | None
    ) -> None:
        if ready is not None:
            ready.synchronize()
        content = {name: tensor.cpu() for name, tensor in spilled.content.items()}
        layer, head, slot = (index.cpu() for index in taken)
        self.arrive(layers, (layer, head, slot), spilled.row.cpu(), content)

    def arrive(
        self, layers: Tensor, taken: Places, row: Tensor, content: dict[str, Tensor]
    ) -> None:
        """Entries leave and others come; see Tier.exchange and Spilled.

        Args:
            layers: int64 [layers], of the store: those of all that follows.
            taken: see Tier.exchange.
            row: see Spilled.
            content: see Spilled.
        """
        num_rows = len(layers) * self.shape[1]
        more, remainder = divmod(len(row) - len(taken[0]), num_rows)
        assert remainder == 0, "KV heads would hold different numbers of entries"
        count = self.counts[int(layers[0])]
        end = min(count + more, self._memory.grow(count + more))
        holes = taken[0] * self.shape[1] + taken[1], taken[2]
        if count + more > end:
            lost = count + more - end
            self._num_lost += lost * len(layers)
            ranks = [self._side(name)[layers, :, :end] for name in ("importance", "positions")]
            target, slot, stays = spill_places.make_room(holes, count, ranks, row, content, lost)
            content = {name: numbers[stays] for name, numbers in content.items()}
        else:
            target, slot = spill_places.free_places(holes, num_rows, count, end)
        # In each row there are as many free slots as entries to come; both are in order of rows.
        target = layers[target // self.shape[1]] * self.shape[1] + target % self.shape[1]
        for name, numbers in content.items():
            if name in _SMALL:
                side = self._side(name)
                index = target * side.shape[2] + slot
                side.view(-1).index_copy_(0, index, numbers.to(_SMALL[name]))
            else:
                self._memory.write(name, target, slot, numbers)
        for index in layers.tolist():
            self.counts[index] = end
        keys_of = partial(self._memory.read, "keys")
        self._bounds.update(target, slot, end, self._memory.capacity, keys_of)

    def _side(self, name: str) -> Tensor:
        """[layers, kv_heads, capacity], with room for all that keys and values have."""
        capacity = self._memory.capacity
        side = self._side_as_is(name)
        if side.shape[2] < capacity:
            self._small[name] = side = grown(side, capacity)
        return side

    def _side_as_is(self, name: str) -> Tensor:
        return self._small.get(name, torch.empty(*self.shape, 0, dtype=_SMALL[name]))


class SpillView:
    """Some layers of a store; see paged_kv.policies.tier.Tier.

    Args:
        store: of a sequence.
        layers: int64, of the store, with equally many entries.
    """

    page_size = PAGE_SIZE

    def __init__(self, store: SpillStore, layers: Tensor) -> None:
        self.store, self.layers = store, layers
        self._layer_set = set(layers.tolist())

    @property
    def num_entries(self) -> int:
        """Per layer and KV head."""
        return self.store.count(self.layers)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """Least and largest number in each channel of a page's keys; see Tier."""
        self.store.wait(self._layer_set)
        return self.store.bounds(self.layers)

    def read(self, name: str, places: Places) -> Tensor:
        """Keys or values [..., size], positions or scores [...]."""
        self.store.wait(self._layer_set)
        return self.store.take(name, (self.layers[places[0]], *places[1:]))

    def recall(self) -> Memo | None:
        """What was remembered of these layers last; None: nothing yet."""
        memos = [self.store.memos.get(layer) for layer in self.layers.tolist()]
        known = [memo for memo in memos if memo is not None]
        if len(known) < len(memos):
            return None
        return known[0]._replace(fetched=torch.stack([memo.fetched for memo in known]))

    def remember(self, memo: Memo) -> None:
        """Keeps this for the next compaction of the sequence."""
        for layer, fetched in zip(self.layers.tolist(), memo.fetched.unbind(0), strict=True):
            self.store.memos[layer] = memo._replace(fetched=fetched)

    def exchange(self, taken: Places, spilled: Spilled) -> None:
        """Entries leave and others come, in the background; see Tier."""
        self.store.submit(self.layers, taken, spilled)


@cache
def _executor() -> ThreadPoolExecutor:
    """One thread for all: what it does is bound by memory, and the model needs the cores."""
    return ThreadPoolExecutor(1, "paged_kv_spill")


os.register_at_fork(after_in_child=_executor.cache_clear)  # threads stay behind
