"""What sequences that compact together hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from paged_kv.policies.base import Int64s
from paged_kv.store.layers import PageStore
from paged_kv.store.ragged import to_device

Tensor = torch.Tensor
MAX_NUMBERS = 1 << 21  # gathered at once
_BY_EVENT = "num_tokens", "num_entries", "num_losers", "rated", "tail", "rows", "first"


@dataclass(frozen=True)
class Holding:
    """What some sequences hold in some equal layers; but for the page ids, host arrays.

    Args:
        layers: int64 [layers], of the store.
        pages: int64 [layers or 1, events, n], page ids, any valid one for padding: vLLM's layers
            share a table, transformers' have one each.
        num_tokens: int64 [events], tokens seen so far.
        num_entries: int64 [events], entries held.
        num_losers: int64 [events], entries to give up, at least one.
        rated: int64 [events], of the entries held, the first ones that have been rated.
        tail: int64 [events], the newest entries, which stay where they are.
        rows: int64 [events], of the query ring.
        first: int64 [events], the first token whose query is there.
        owners: who they are: request ids (rows of the batch, if nobody spills), or rows of a
            cache.
    """

    layers: Int64s
    pages: Tensor
    num_tokens: Int64s
    num_entries: Int64s
    num_losers: Int64s
    rated: Int64s
    tail: Int64s
    rows: Int64s
    first: Int64s
    owners: Sequence[Any]

    def of_events(self, events: Int64s, num_pages: int) -> Holding:
        """Some of the sequences; num_pages: the most that one of them holds."""
        chosen = {name: getattr(self, name)[events] for name in _BY_EVENT}
        pages = self.pages[:, to_device(events, self.pages.device), :num_pages]
        return replace(self, **chosen, pages=pages, owners=[self.owners[event] for event in events])

    def of_layers(self, start: int, end: int) -> Holding:
        """Layers [start, end)."""
        pages = self.pages if len(self.pages) == 1 else self.pages[start:end]
        return replace(self, layers=self.layers[start:end], pages=pages)


def parts(store: PageStore, holding: Holding, size: int) -> Iterator[Holding]:
    """Sequences of similar size, in a few layers at a time: copies of what they hold are large.

    Args:
        store: the layers.
        holding: of all sequences.
        size: numbers of an entry that are looked at.
    """
    pages = store.pages
    num_pages = -(-holding.num_entries // pages.page_size)
    for events in similar(num_pages):
        most = int(num_pages[events].max())
        some = holding.of_events(events, most)
        entries = len(events) * most * pages.page_size * pages.num_heads
        at_once = max(1, MAX_NUMBERS // (entries * size))
        for start in range(0, len(holding.layers), at_once):
            yield some.of_layers(start, start + at_once)


def similar(counts: Int64s) -> Iterator[Int64s]:
    """Indices of counts of which the largest is less than twice the smallest; int64 each."""
    if len(counts) == 1:
        yield np.zeros(1, dtype=np.int64)
        return
    magnitude = np.frexp(counts)[1]
    for exponent in np.unique(magnitude):
        yield np.flatnonzero(magnitude == exponent)
