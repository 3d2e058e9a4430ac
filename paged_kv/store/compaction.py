"""Compactions: what sequences hold becomes a region, the policy decides, survivors move.

The freed places are the leading ones ("head": vLLM's tables only grow at their end, and what comes
first can be given back) or the trailing ones ("tail": transformers' tables can be cut, and a row
stays in the pages that it has). Of a row with a residual, the newest entries stay where they are:

    head   before | s s . x | . x . . | x . x x |         s sink  x survivor  . loser
           after  |  freed  |  freed  | s s x x ...       survivors of what is freed take the
                                                          losers' places
    tail   before | s s . x | . x . . | x . x x | r r r   r residual
           after  | s s x x | x x x . |  freed  | r r r
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from paged_kv.kernels.index import Index, entry_index, slot_index
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.entries import take
from paged_kv.policies.region import Compaction, Exchanged, Region, RegionIndex, moves
from paged_kv.policies.written import NO_FACTS, ModelFacts
from paged_kv.store.entries import Entries
from paged_kv.store.holding import Holding, parts
from paged_kv.store.layers import PageStore
from paged_kv.store.ragged import to_device
from paged_kv.store.rating import rate

Tensor = torch.Tensor
Freed = Literal["head", "tail"]
_FEW = 8
_PADDING = torch.iinfo(torch.int64).max
_BESIDE = {"weights", "scores", "ratings"}


def compact(
    policy: Policy,
    store: PageStore,
    holding: Holding,
    freed: Freed,
    facts: ModelFacts = NO_FACTS,
    note: Callable[[Holding, Region, Compaction], None] | None = None,
) -> None:
    """Sequences give up entries in all layers of a holding.

    Args:
        policy: decides.
        store: the layers.
        holding: see Holding.
        freed: which places are given back.
        facts: of the model, as far as the policy asks.
        note: called with what was decided, a few layers and sequences at a time.
    """
    if "ratings" in policy.reads:
        rate(policy, store, holding, facts)
    # What is gathered of an entry, and its copies: keys or values, or a few numbers beside them.
    size = store.pages.keys.size if policy.reads_wholly & {"keys", "values"} else _FEW
    for part in parts(store, holding, size):
        region = make_region(policy, store, part, facts)
        decided = policy.compact(region).checked(region, type(policy).__name__)
        apply(store, part, region, decided, freed)
        if note is not None:
            note(part, region, decided)


def make_region(
    policy: Policy, store: PageStore, holding: Holding, facts: ModelFacts = NO_FACTS
) -> Region:
    """What a policy sees of a holding."""
    device, pages = store.pages.device, holding.pages
    layers = to_device(holding.layers, device)
    stack_layers = store.stack_layers[layers]
    num_tokens, num_entries, num_losers = (
        to_device(array, device)
        for array in (holding.num_tokens, holding.num_entries, holding.num_losers)
    )
    padding = _padding(holding, num_entries, store.pages.page_size)

    def side(name: str, filler: float) -> Tensor:
        found = store.side.gather(name, stack_layers, pages)
        return found if padding is None else found.masked_fill_(padding, filler)

    fields: dict[str, Any] = {
        name: getattr(store.pages, name).gather(stack_layers, pages)
        for name in policy.reads_wholly & {"keys", "values"}
    }
    fields |= {name: side(name, 0.0) for name in policy.reads & _BESIDE}
    queries = store.queries(layers, holding.rows, holding.num_tokens, holding.first)
    if queries is not None:
        fields["queries"] = queries
    spilled = None
    if store.spilled is not None:
        chosen = holding.layers.tolist()
        spilled = [store.spilled(owner).select(chosen) for owner in holding.owners]
    return Region(
        num_tokens=num_tokens,
        num_entries=num_entries,
        num_losers=num_losers,
        max_losers=int(holding.num_losers.max()),
        max_survivors=int((holding.num_entries - holding.num_losers).max()),
        layers=to_device(store.layer_ids[holding.layers], device),
        heads=to_device(store.head_ids, device),
        positions=side("positions", _PADDING),
        **fields,
        rotary=facts.rotary,
        spilled=spilled,
        partly={
            name: _PageReader(getattr(store.pages, name), stack_layers, pages)
            for name in policy.reads_partly
        },
    )


def _padding(holding: Holding, num_entries: Tensor, page_size: int) -> Tensor | None:
    """bool [events, 1, m]; None where all pages are full: a pass over the region less for each."""
    size = holding.pages.shape[-1] * page_size
    if bool((holding.num_entries == size).all()):
        return None
    return torch.arange(size, device=num_entries.device) >= num_entries[:, None, None]


@dataclass(frozen=True)
class _PageReader:
    """Keys or values of a region that are read as they are asked for; see region.EntryReader.

    Args:
        entries: of the pages.
        layers: int64 [layers], of the stack.
        pages: see Holding.
    """

    entries: Entries
    layers: Tensor
    pages: Tensor

    def take(self, index: RegionIndex) -> Tensor:
        """What lies in some slots: [n, size]."""
        return self.entries.take(
            entry_index(self.layers, self.pages, index, self.entries.page_size)
        )

    def of_event(self, event: int) -> Tensor:
        """All that one sequence holds: [layers, kv_heads, m, size]."""
        return self.entries.gather(self.layers, self.pages[..., event : event + 1, :])[:, 0]


def apply(
    store: PageStore, holding: Holding, region: Region, decided: Compaction, freed: Freed
) -> None:
    """Survivors move into the losers' places; those that hold something else are written.

    Args:
        store: the layers.
        holding: which sequences.
        region: what they held.
        decided: what becomes of it.
        freed: which places are given back.
    """
    size, page_size = decided.losers.shape[-1], store.pages.page_size
    stack_layers = store.stack_layers[to_device(holding.layers, store.pages.device)]
    # A slot that stays in every row: the last one (padding, in shorter rows), or the first.
    spare = size - 1 if freed == "head" else 0
    places = _freed_places(region, holding.tail, freed)
    source, target = moves(decided, places, region.max_losers, spare)
    read, write = (
        slot_index(stack_layers, holding.pages, slots, page_size) for slots in (source, target)
    )
    for entries in store.pages:
        entries.move(read, write)
    store.side.move(read, write)
    if decided.changed is not None:
        _write_changed(store, write, decided, source)
    if decided.exchanged is not None:
        # Where each survivor lies now, by where it was.
        slots = torch.arange(size, device=source.device).expand(*source.shape[:-1], size)
        slots = slots.scatter(-1, source, target)
        _write_exchanged(store, stack_layers, holding.pages, slots, decided.exchanged)


def _freed_places(region: Region, tail: Int64s, freed: Freed) -> Tensor:
    """bool [events, 1, m]."""
    slots = torch.arange(region.positions.shape[-1], device=region.positions.device)
    num_losers = region.num_losers[:, None, None]
    if freed == "head":
        return slots < num_losers
    end = (region.num_entries - to_device(tail, slots.device))[:, None, None]
    return (slots >= end - num_losers) & (slots < end)


def _write_changed(store: PageStore, write: Index, decided: Compaction, source: Tensor) -> None:
    """Numbers of survivors that changed, where they lie now.

    What has not changed keeps its bits: quantized again, it could become something else. As many
    columns are written whatever has changed, so that nobody waits for a GPU.
    """
    assert decided.changed is not None
    changed = decided.changed.gather(-1, source)
    for name, entries in zip(store.pages._fields, store.pages, strict=True):
        new: Tensor | None = getattr(decided, name)
        if new is not None:
            entries.store(write, take(new, source), changed)
    for name in store.side.tensors:
        new = getattr(decided, name)
        if new is not None:
            store.side.store(name, write, new.gather(-1, source), changed)


def _write_exchanged(
    store: PageStore, stack_layers: Tensor, pages: Tensor, slots: Tensor, exchanged: Exchanged
) -> None:
    """What came in the place of survivors, where these lie now: slots [..., m]."""
    layer, event, head, _ = exchanged.places
    moved = layer, event, head, slots[exchanged.places]
    index = entry_index(stack_layers, pages, moved, store.pages.page_size)
    for name, rows in exchanged.content.items():
        if name in store.side.tensors:
            store.side.store(name, index, rows)
        else:
            getattr(store.pages, name).store(index, rows.float())
