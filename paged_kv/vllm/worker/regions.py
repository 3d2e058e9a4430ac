"""A compaction that looks at entries: gathers regions, asks the policy, writes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from paged_kv.kernels.packed_pages import PackedPart
from paged_kv.kernels.pages import Part, entry_index, region_index, slot_index
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Events, Int64s, Policy
from paged_kv.policies.region import Compaction, Queries, Region, moves
from paged_kv.policies.spill import Exchanged, Spill
from paged_kv.vllm.worker.layer_group import Stack
from paged_kv.vllm.worker.observation import page_ids

if TYPE_CHECKING:
    from paged_kv.tiers.spill_store import SpillStore

MAX_NUMBERS = 1 << 21  # of keys, gathered at once
_PADDING = torch.iinfo(torch.int64).max


class Batch(NamedTuple):
    """Sequences that compact together; host arrays of shape [events].

    Args:
        rows: of the block table.
        ring: rows of the query ring.
        first_query: first token whose query the ring has seen.
        events: see Events.
        spilled: what each has spilled in the stack's layers, if the policy spills.
    """

    rows: Int64s
    ring: Int64s
    first_query: Int64s
    events: Events
    spilled: Sequence[SpillStore] | None = None

    def take(self, chosen: Int64s) -> Batch:
        """Some of the sequences."""
        events = Events(*(array[chosen] for array in vars(self.events).values()))
        spilled = None if self.spilled is None else [self.spilled[event] for event in chosen]
        rows, ring, first_query = (
            array[chosen] for array in (self.rows, self.ring, self.first_query)
        )
        return Batch(rows, ring, first_query, events, spilled)


def compact(
    policy: Policy, stack: Stack, table: torch.Tensor, batch: Batch, rotary: Rotary | None
) -> int:
    """Compacts sequences in all layers of a stack; how many entries were fetched back.

    Args:
        policy: decides.
        stack: the layers.
        table: [rows, pages], page ids.
        batch: see Batch.
        rotary: the model's RoPE, if the policy reads it.
    """
    num_fetched = 0
    for similar in _of_similar_size(batch, stack.pages.page_size):
        events = similar.events
        first, end = events.evicted_before, events.num_tokens
        pages = page_ids(table, similar.rows, first, end, stack.pages.page_size)
        # A layer's keys, values and copies of them can be large: a few layers at a time.
        numbers = pages.numel() * stack.pages.page_size * stack.pages.num_heads
        at_once = max(1, MAX_NUMBERS // (numbers * stack.pages.keys.size))
        layers = torch.arange(stack.pages.num_layers, device=pages.device)
        for chosen in layers.split(at_once):
            region = _gather(policy, stack, chosen, pages, similar, rotary)
            if isinstance(policy, Spill):
                exchanged = policy.exchange(region)
                moved = _apply(stack, chosen, pages, region, Compaction(exchanged.losers))
                _replace(stack, chosen, pages, exchanged, moved)
                num_fetched += len(exchanged.places[0])
            else:
                _apply(stack, chosen, pages, region, policy.compact(region))
    return num_fetched


def _of_similar_size(batch: Batch, page_size: int) -> Iterator[Batch]:
    """Batches whose largest region has less than twice the pages of its smallest."""
    events = batch.events
    pages = -(-(events.num_tokens - events.evicted_before) // page_size)
    size = np.frexp(pages)[1]
    for one in np.unique(size):
        yield batch.take(np.flatnonzero(size == one))


def _gather(
    policy: Policy,
    stack: Stack,
    layers: torch.Tensor,
    pages: torch.Tensor,
    batch: Batch,
    rotary: Rotary | None,
) -> Region:
    device, events = pages.device, batch.events
    index = region_index(layers, pages, stack.pages.num_heads, stack.pages.page_size)
    num_tokens, num_entries, num_losers = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (
            events.num_tokens,
            events.num_tokens - events.evicted_before,
            events.evicted_after - events.evicted_before,
        )
    )

    def part(name: str) -> Any:
        if not _reads(policy, name):
            return None
        whole = getattr(stack.pages, name)
        if isinstance(policy, Spill) and not _reads(policy.inner, name):
            return _Lazy(whole, layers, pages, stack.pages.page_size)
        return whole.gather(layers, pages)

    def side(name: str, padding: float) -> torch.Tensor | None:
        values = stack.side.read(name, index)
        return None if values is None else values.flatten(-2).masked_fill(~valid, padding)

    valid = torch.arange(pages.shape[1] * stack.pages.page_size, device=device)
    valid = valid < num_entries[:, None, None]
    positions = side("positions", _PADDING)
    assert positions is not None
    spilled = batch.spilled
    return Region(
        num_tokens=num_tokens,
        num_entries=num_entries,
        num_losers=num_losers,
        max_losers=int((events.evicted_after - events.evicted_before).max()),
        layers=stack.layer_ids[layers],
        heads=stack.head_ids,
        positions=positions,
        keys=part("keys"),
        values=part("values"),
        weights=side("weights", 0.0),
        scores=side("scores", 0.0),
        queries=_queries(stack, layers, batch),
        rotary=rotary,
        spilled=None if spilled is None else [store.select(layers.tolist()) for store in spilled],
    )


def _reads(policy: Policy, name: str) -> bool:
    """Whether a policy's regions must have something; an observation window is for keys."""
    return name in policy.reads or (name == "keys" and policy.observation_window > 0)


def _queries(stack: Stack, layers: torch.Tensor, batch: Batch) -> Queries | None:
    """The observation windows. Column c of the ring holds the newest token t with t % w = c."""
    if stack.ring is None:
        return None
    window = stack.ring.shape[2]
    newest = batch.events.num_tokens[:, None] - 1
    positions = newest - (newest - np.arange(window)) % window
    positions = np.where(positions >= batch.first_query[:, None], positions, -1)
    ring = torch.from_numpy(batch.ring).to(stack.ring.device, non_blocking=True)
    states = stack.grouped(stack.ring[layers[:, None], ring])
    sinks = None if stack.sinks is None else stack.sinks[layers]
    places = torch.from_numpy(positions).to(stack.ring.device, non_blocking=True)
    return Queries(states, places, stack.scale, stack.softcap, sinks)


class _Lazy:
    """Keys or values of a region, of which not all are read; float32 like a tensor of them.

    Args:
        part: of the pages.
        layers: of the region.
        pages: of the region.
        page_size: entries per page.
    """

    def __init__(
        self, part: Part | PackedPart, layers: torch.Tensor, pages: torch.Tensor, page_size: int
    ) -> None:
        self.part, self.layers, self.pages, self.page_size = part, layers, pages, page_size

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What lies in (layer, event, KV head, slot), or in (:, event).

        Args:
            index: int64 [n] each: [n, size]; or (all layers, int): [layers, kv_heads, m, size].
        """
        if len(index) == 4:
            return self.part.take(entry_index(self.layers, self.pages, index, self.page_size))
        layers, event = index
        return self.part.gather(self.layers[layers], self.pages[event : event + 1])[:, 0]


def _replace(
    stack: Stack,
    layers: torch.Tensor,
    pages: torch.Tensor,
    exchanged: Exchanged,
    moved: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Writes what is fetched to where the survivors lie now, in whose place it comes."""
    source, target = moved
    size = exchanged.losers.shape[-1]
    slots = torch.arange(size, device=pages.device).expand(*source.shape[:-1], size)
    layer, event, head, _ = exchanged.places
    slot = slots.scatter(-1, source, target)[exchanged.places]
    index = entry_index(layers, pages, (layer, event, head, slot), stack.pages.page_size)
    for name, rows in exchanged.content.items():
        if name in stack.side.tensors:
            stack.side.write(name, index, rows)
        else:
            getattr(stack.pages, name).store(index, rows.float())


def _apply(
    stack: Stack, layers: torch.Tensor, pages: torch.Tensor, region: Region, decided: Compaction
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves survivors into the losers' places, and writes survivors that changed.

    Returns (source, target) of the moves; see moves.
    """
    index = torch.arange(decided.losers.shape[-1], device=pages.device)
    freed = index < region.num_losers[:, None, None]
    source, target = moves(decided, freed, region.max_losers, spare=len(index) - 1)
    page_size = stack.pages.page_size
    read = slot_index(layers, pages, source, page_size)
    write = slot_index(layers, pages, target, page_size)
    for name in ("keys", "values"):
        part, new = getattr(stack.pages, name), getattr(decided, name)
        if new is None:
            part.move(read, write)
        else:  # numbers that were not changed give the bits that they came from
            part.store(write, _at(new, source))
    for name in stack.side.tensors:
        new, old = getattr(decided, name), getattr(region, name)
        stack.side.write(name, write, (old if new is None else new).gather(-1, source))
    return source, target


def _at(entries: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[..., columns, size] of [..., m, size]."""
    return entries.take_along_dim(slots[..., None], -2)
