"""What one sequence has spilled, and what arrives there in the background.

Whoever reads waits for what is under way. Entries that are not held any more make room for others;
where there is none left, the least important are lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import torch

from paged_kv.kernels import reference
from paged_kv.tiers.spill_memory import SpillMemory, SpillSpace

if TYPE_CHECKING:
    from paged_kv.policies.spill import Places, Spilled

Tensor = torch.Tensor
PAGE_SIZE = 32  # entries that have one summary
_SMALL = {"positions": torch.int32, "importance": torch.float32, "scores": torch.float32}


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
        # Least and largest number in each channel of a page: [layers, kv_heads, pages, key_size].
        self._bounds = [torch.empty(*self.shape, 0, self.sizes[0], dtype=self.dtype)] * 2
        self._num_lost = 0

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
        small = sum(tensor.nbytes for tensor in [*self._small.values(), *self._bounds])
        return {"host": host + small, "mmap": mmap}

    def copy(self) -> SpillStore:
        """One with the same entries; with the most important, if there is no room for all."""
        self.wait()
        other = SpillStore(self.shape, self.sizes, self.dtype, self.space)
        for count in set(self.counts) - {0}:
            layers = torch.tensor([at for at, held in enumerate(self.counts) if held == count])
            which = torch.ones(len(layers), self.shape[1], count, dtype=torch.bool)
            layer, head, slot = which.nonzero(as_tuple=True)
            places = layers[layer], head, slot
            content = {name: self.read(name, places) for name in ("keys", "values")}
            small = {name: part[layers, :, :count] for name, part in self._small.items()}
            if "scores" in small:
                content["scores"] = small["scores"].flatten()
            nothing = torch.zeros(0, dtype=torch.int64)
            taken = nothing, nothing, nothing
            other.arrive(layers, taken, which, small["importance"], small["positions"], content)
        return other

    def read(self, name: str, places: Places) -> Tensor:
        """Keys or values [..., size], positions or scores [...]; layers are those of the store."""
        self.wait()
        return self.take(name, places)

    def take(self, name: str, places: Places) -> Tensor:
        """The same of layers that nobody writes to (see wait); others may grow meanwhile."""
        layer, head, slot = torch.broadcast_tensors(*places)
        if name in _SMALL:
            # Not _side: that is for the thread that writes.
            held = self._small.get(name, torch.empty(*self.shape, 0, dtype=_SMALL[name]))
            return held[layer, head, slot]
        return self._memory.read(name, layer * self.shape[1] + head, slot)

    def bounds(self, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest number in each channel of the pages of layers that hold as much.

        Nobody writes to these layers, see wait.
        """
        num_pages = -(-self.counts[int(layers[0])] // PAGE_SIZE)
        least, largest = (bound[layers, :, :num_pages] for bound in self._bounds)
        return least, largest

    def count(self, layers: Tensor) -> int:
        """Entries of each of these layers, which hold equally many."""
        chosen = set(layers.tolist())
        self.wait(chosen)
        counts = {self.counts[layer] for layer in chosen}
        assert len(counts) == 1, "these layers do not hold equally many entries"
        return counts.pop()

    def wait(self, layers: set[int] | None = None) -> None:
        """Until what was given to some layers, or to all, has arrived; raises what went wrong."""
        work = [one for one in self._work if layers is None or one[0] & layers]
        self._work = [one for one in self._work if one not in work]
        for _, one in work:
            one.result()

    def submit(self, layers: Tensor, taken: Places, given: Spilled) -> None:
        """exchange of a view, in the background."""
        ready = None
        if given.which.is_cuda:  # what is given may still be in the making
            ready = torch.cuda.Event()
            ready.record()
        work = _executor().submit(self._receive, layers, taken, given, ready)
        self._work.append((set(layers.tolist()), work))

    @torch.no_grad()
    def _receive(
        self, layers: Tensor, taken: Places, given: Spilled, ready: torch.cuda.Event | None
    ) -> None:
        if ready is not None:
            ready.synchronize()
        which, importance, positions = (
            tensor.cpu() for tensor in (given.which, given.importance, given.positions)
        )
        content = {name: tensor.cpu() for name, tensor in given.content.items()}
        layer, head, slot = (index.cpu() for index in taken)
        self.arrive(layers, (layer, head, slot), which, importance, positions, content)

    def arrive(
        self,
        layers: Tensor,
        taken: Places,
        which: Tensor,
        importance: Tensor,
        positions: Tensor,
        content: dict[str, Tensor],
    ) -> None:
        """Entries leave and others come; see Tier.exchange and Spilled.

        Args:
            layers: int64 [layers], of the store: those of all that follows.
            taken: see Tier.exchange.
            which: see Spilled.
            importance: see Spilled.
            positions: see Spilled.
            content: see Spilled.
        """
        more, rest = divmod(int(which.sum()) - len(taken[0]), len(layers) * self.shape[1])
        assert rest == 0, "KV heads would hold different numbers of entries"
        count = self.counts[int(layers[0])]
        end = min(count + more, self._memory.grow(count + more))
        free = torch.zeros(*which.shape[:2], end, dtype=torch.bool)
        free[..., count:] = True
        free[taken] = True
        stays = which
        if count + more > end:
            lost = count + more - end
            gone = self._weakest(layers, free, which, importance, positions, lost)
            free |= gone[..., :end]
            stays = which & ~gone[..., end:]
            self._num_lost += lost * len(layers)
        # In each row there are as many free slots as entries to come; both are in order of rows.
        layer, head, slot = free.nonzero(as_tuple=True)
        row = layers[layer] * self.shape[1] + head
        chosen = slice(None) if stays is which else stays[which]  # a mask would copy all
        small = {"positions": positions[stays], "importance": importance[stays]}
        for name, numbers in content.items():
            if name in _SMALL:
                small[name] = numbers[chosen]
            else:
                self._memory.write(name, row, slot, numbers[chosen])
        for name, numbers in small.items():
            self._side(name)[layers[layer], head, slot] = numbers.to(_SMALL[name])
        for index in layers.tolist():
            self.counts[index] = end
        self._summarize(row, slot, end)

    def _weakest(
        self,
        layers: Tensor,
        free: Tensor,
        which: Tensor,
        importance: Tensor,
        positions: Tensor,
        count: int,
    ) -> Tensor:
        """bool [layers, kv_heads, end + m]: `count` of those that are held or come."""
        end = free.shape[-1]
        held = self._side("importance")[layers, :, :end], self._side("positions")[layers, :, :end]
        return reference.lowest(
            torch.cat([held[0], importance], -1),
            torch.cat([held[1].long(), positions], -1),
            torch.cat([free, ~which], -1),
            torch.tensor([[count]]),
            count,
        )

    def _side(self, name: str) -> Tensor:
        """[layers, kv_heads, capacity], with room for all that keys and values have."""
        capacity = self._memory.capacity
        held = self._small.get(name, torch.empty(*self.shape, 0, dtype=_SMALL[name]))
        if held.shape[2] < capacity:
            self._small[name] = held = _grown(held, capacity)
        return held

    def _summarize(self, row: Tensor, slot: Tensor, end: int) -> None:
        """New summaries of the pages that have these slots, of rows of `end` entries."""
        num_pages = -(-self._memory.capacity // PAGE_SIZE)
        if self._bounds[0].shape[2] < num_pages:
            self._bounds = [_grown(bound, num_pages) for bound in self._bounds]
        pages = torch.unique(row * num_pages + slot // PAGE_SIZE)
        slots = (pages % num_pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        rows = (pages // num_pages)[:, None].expand_as(slots)
        keys = self._memory.read("keys", rows, slots.clamp_max(end - 1))
        # Past the end the last entry is read once more, which changes neither.
        least, largest = keys.amin(1), keys.amax(1)
        for bound, numbers in zip(self._bounds, (least, largest), strict=True):
            bound.flatten(0, 2)[pages] = numbers


class SpillView:
    """Some layers of a store; see paged_kv.policies.spill.Tier.

    Args:
        store: of a sequence.
        layers: int64, of the store, with equally many entries.
    """

    page_size = PAGE_SIZE

    def __init__(self, store: SpillStore, layers: Tensor) -> None:
        self.store, self.layers = store, layers
        self._own = set(layers.tolist())

    @property
    def num_entries(self) -> int:
        """See Tier."""
        return self.store.count(self.layers)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """See Tier."""
        self.store.wait(self._own)
        return self.store.bounds(self.layers)

    def read(self, name: str, places: Places) -> Tensor:
        """See Tier."""
        self.store.wait(self._own)
        return self.store.take(name, (self.layers[places[0]], *places[1:]))

    def exchange(self, taken: Places, given: Spilled) -> None:
        """See Tier."""
        self.store.submit(self.layers, taken, given)


@cache
def _executor() -> ThreadPoolExecutor:
    """One thread for all: what it does is bound by memory, and the model needs the cores."""
    return ThreadPoolExecutor(1, "paged_kv_spill")


os.register_at_fork(after_in_child=_executor.cache_clear)  # threads stay behind


def _grown(tensor: Tensor, size: int) -> Tensor:
    """The same [layers, kv_heads, n, ...] with room for `size`."""
    new = tensor.new_zeros(*tensor.shape[:2], size, *tensor.shape[3:])
    new[:, :, : tensor.shape[2]] = tensor
    return new
