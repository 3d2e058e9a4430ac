"""Entries are rated once: those that have come since the last compaction, before they may go."""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.kernels.index import region_index
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.written import ModelFacts, Written
from paged_kv.store.holding import MAX_NUMBERS, Holding, similar
from paged_kv.store.layers import PageStore
from paged_kv.store.ragged import to_device

Tensor = torch.Tensor


def rate(policy: Policy, store: PageStore, holding: Holding, facts: ModelFacts) -> None:
    """Stores what the policy says of entries that have no rating yet; whole pages at a time.

    Of the page in which the first of them lies, others are rated again, and so is everything under
    a policy that merges: an entry's rating follows from what it holds.

    Args:
        policy: reads ratings.
        store: the layers.
        holding: who is about to compact.
        facts: of the model.
    """
    page_size = store.pages.page_size
    first = holding.rated // page_size * (not policy.merges)
    last = (holding.num_entries - 1) // page_size
    for events in similar(last - first + 1):
        pages = _pages(holding, events, first[events], last[events])
        numbers = pages[0].numel() * page_size * store.pages.num_heads * store.pages.keys.size
        at_once = max(1, MAX_NUMBERS // numbers)
        for start in range(0, len(holding.layers), at_once):
            some = slice(start, start + at_once)
            tables = pages if len(pages) == 1 else pages[some]
            _rate(policy, store, holding.layers[some], tables, facts)


def _pages(holding: Holding, events: Int64s, first: Int64s, last: Int64s) -> Tensor:
    """int64 [layers or 1, events, n]: pages from first to last; rows with fewer repeat the last.

    Written twice with the same ratings, a page comes to no harm.
    """
    column = first[:, None] + np.arange(int((last - first).max()) + 1)
    column = np.minimum(column, last[:, None])
    device = holding.pages.device
    return holding.pages[:, to_device(events[:, None], device), to_device(column, device)]


def _rate(
    policy: Policy, store: PageStore, layers: Int64s, pages: Tensor, facts: ModelFacts
) -> None:
    stack_layers = store.stack_layers[to_device(layers, pages.device)]
    page_size = store.pages.page_size
    keys, values = (part.gather(stack_layers, pages) for part in store.pages)
    positions = store.side.gather("positions", stack_layers, pages)
    entries = Written(keys, values, positions, store.layer_ids[layers], store.head_ids, facts)
    ratings = policy.rate(entries).unflatten(-1, (-1, page_size))
    index = region_index(stack_layers, pages, store.pages.num_heads, page_size)
    store.side.store("ratings", index, ratings)
