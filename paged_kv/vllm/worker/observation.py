"""What the forward pass shows: the last queries, and attention probabilities summed up.

Fused kernels hide probabilities. Policies that look just before a compaction cost one small copy
per layer and step: the queries go into a ring, and their probabilities are computed when they are
needed. Cumulative policies compute every step's attention a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.kernels.index import region_index
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.kernels.reference import attention_probabilities
from paged_kv.policies.base import Int64s, Policy
from paged_kv.store.layers import PageStore
from paged_kv.store.query_ring import RingWrite, grouped
from paged_kv.store.ragged import to_device

MAX_PROBABILITIES = 1 << 24  # computed at once


class StepRows(NamedTuple):
    """The sequences of a batch in this step; arrays of shape [rows]. Host numbers.

    Args:
        start: where the tokens of each begin in the batch.
        num_new: tokens of each.
        after: length of each sequence after this step.
        evicted: slots that earlier compactions freed.
        ring: row of each in the query ring.
    """

    start: Int64s
    num_new: Int64s
    after: Int64s
    evicted: Int64s
    ring: Int64s


class QueryBatch(NamedTuple):
    """Sequences whose queries are looked at together, padded to the longest.

    Args:
        token: int64 [rows, queries], index in the batch; 0 for padding.
        positions: int64 [rows, queries]; -1 for padding.
        pages: int64 [rows, pages], page ids; 0, vLLM's null page, for padding.
        first_slot: int64 [rows], slot of the first entry.
    """

    token: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    first_slot: torch.Tensor


@dataclass
class Observed:
    """What the forward pass of a builder's layers must note in a step.

    Args:
        stores: of each layer, by name: its store, and its index there.
        ring: where the last queries go; None if they are not kept.
        batches: whose probabilities are added up.
        positions: int64 [tokens], while statistics are gathered; else None.
    """

    stores: dict[str, tuple[PageStore, int]]
    ring: RingWrite | None
    batches: list[QueryBatch]
    positions: torch.Tensor | None


def query_batches(
    rows: StepRows, wanted: npt.NDArray[np.bool_], table: torch.Tensor, page_size: int
) -> Iterator[QueryBatch]:
    """Decoding sequences in one batch, prompts in another: little padding.

    Args:
        rows: the sequences.
        wanted: bool [rows], which of them.
        table: [rows, pages], page ids.
        page_size: entries per page.
    """
    single = rows.num_new == 1
    for chosen in (np.flatnonzero(wanted & single), np.flatnonzero(wanted & ~single)):
        if not chosen.size:
            continue
        count, after, evicted = rows.num_new[chosen], rows.after[chosen], rows.evicted[chosen]
        offset = np.arange(count.max())
        real = offset < count[:, None]
        token = np.where(real, rows.start[chosen][:, None] + offset, 0)
        positions = np.where(real, (after - count)[:, None] + offset, -1)
        pages = page_ids(table, chosen, evicted, after, page_size)
        device = table.device
        yield QueryBatch(
            to_device(token, device),
            to_device(positions, device),
            pages,
            to_device(evicted, device),
        )


def page_ids(
    table: torch.Tensor, rows: Int64s, first: Int64s, end: Int64s, page_size: int
) -> torch.Tensor:
    """Pages of the slots [first, end) of some rows: int64 [rows, pages], 0 for padding.

    Args:
        table: [rows of the batch, pages], page ids.
        rows: which rows.
        first: a page's first slot.
        end: past the last slot.
        page_size: entries per page.
    """
    num_pages = -(-(end - first) // page_size)
    column = np.arange(num_pages.max())
    real = column < num_pages[:, None]
    index = np.where(real, (first // page_size)[:, None] + column, 0)
    row, index_, real_ = (to_device(array, table.device) for array in (rows, index, real))
    return torch.where(real_, table[row[:, None], index_].long(), 0)


def accumulate(
    policy: Policy, store: PageStore, layer: int, query: torch.Tensor, batch: QueryBatch
) -> None:
    """Adds the attention of a step's queries to the scores of the entries.

    Args:
        policy: says what becomes of the scores.
        store: the layer's.
        layer: index in the store.
        query: [tokens, heads, head_dim], after RoPE.
        batch: see QueryBatch.
    """
    pages, terms = store.pages, store.terms
    chosen = torch.arange(layer, layer + 1, device=pages.device)  # nothing is copied to it
    keys = pages.keys.gather(chosen, batch.pages)[0]
    scores = store.side.gather("scores", chosen, batch.pages)[0]
    size = scores.shape[-1]
    slots = batch.first_slot[:, None] + torch.arange(size, device=pages.device)
    at_once = max(1, MAX_PROBABILITIES // (len(batch.token) * query.shape[1] * size))
    sinks = None if terms.sinks is None else terms.sinks[layer]
    terms = Terms(terms.scale, terms.softcap, sinks)
    for token, positions in zip(
        batch.token.split(at_once, 1), batch.positions.split(at_once, 1), strict=True
    ):
        states, places = grouped(query[token], pages.num_heads), positions[:, None, None, :]
        attention = DenseAttention(states, keys, places, slots[:, None, :], terms)
        probabilities = attention_probabilities(attention)
        scores = policy.accumulate(scores, probabilities, positions)
    index = region_index(chosen, batch.pages, pages.num_heads, pages.page_size)
    store.side.store("scores", index, scores[None].unflatten(-1, (-1, pages.page_size)))
