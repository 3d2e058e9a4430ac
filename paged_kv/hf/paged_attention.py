"""Attention of new queries to the entries of pages, each row's in slots 0, 1, 2, ...

A query sees all entries that its row held before and, of the new ones, those up to its own: since
compactions leave no holes, that is every slot up to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.kernels.reference import attention_probabilities

Tensor = torch.Tensor
QUERY_BLOCK = 512  # queries whose probabilities are held at once
SMALL_BLOCK = 64  # the same, so few that they fit into a CPU's cache

Bias = Callable[[int, Tensor, Tensor], Tensor]
"""(row, int64 [queries] tokens of the row before each query, int64 [kv_heads or 1, entries] the
same of each entry) -> float32 [heads or 1, queries, entries] to add to the logits, -inf where a
query must not look."""


def fused(
    query: Tensor, keys: Tensor, values: Tensor, first_slots: list[int], scale: float
) -> Tensor:
    """[rows, heads, q, size], by SDPA.

    Args:
        query: [rows, heads, q, head_dim].
        keys: [rows, kv_heads, m, head_dim], any strides; m = q + the largest of first_slots.
        values: [rows, kv_heads, m, size].
        first_slots: slot of each row's first query.
        scale: factor of the logits.
    """
    num_queries, num_entries = query.shape[2], keys.shape[2]
    if num_queries > 1 and num_entries == num_queries:  # nothing was held before
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=_shares(query, keys)
        )
    mask = None
    if num_queries > 1 or min(first_slots) != max(first_slots):
        mask = visible(first_slots, num_queries, num_entries, query.device)
    return masked(query, keys, values, mask, scale)


def masked(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """SDPA in which the query heads of a group are queries of one head: no key is repeated.

    Args:
        query: [rows, heads, q, head_dim].
        keys: [rows, kv_heads, m, head_dim].
        values: [rows, kv_heads, m, size].
        mask: bool or float, [rows or 1, 1 or heads, q, m]; None for none.
        scale: factor of the logits.
    """
    num_heads, num_queries = query.shape[1:3]
    group = num_heads // keys.shape[1]
    folded = query if group == 1 else query.reshape(len(query), keys.shape[1], -1, query.shape[-1])
    if mask is not None and group > 1:
        if mask.shape[1] == 1:
            mask = mask.repeat(1, 1, group, 1)
        else:
            mask = mask.reshape(len(mask), keys.shape[1], group * num_queries, -1)
    output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(len(query), num_heads, num_queries, -1)


def visible(
    first_slots: list[int], num_queries: int, num_entries: int, device: torch.device
) -> Tensor:
    """bool [rows or 1, 1, queries, entries]: slots up to a query's own."""
    if min(first_slots) == max(first_slots):
        first_slots = first_slots[:1]
    first = torch.tensor(first_slots, device=device)[:, None, None, None]
    query_slots = first + torch.arange(num_queries, device=device)[:, None]
    return torch.arange(num_entries, device=device) <= query_slots


def probabilities(
    query: Tensor,
    keys: Tensor,
    first_slots: list[int],
    terms: Terms,
    bias: Tensor | None = None,
    size: int = QUERY_BLOCK,
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first query, float32 [rows, kv_heads, group, queries, n]), block by block.

    n: the entries up to the last one that a query of the block sees. Those behind it get nothing.

    Args:
        query: [rows, heads, q, head_dim].
        keys: [rows, kv_heads, m, head_dim].
        first_slots: slot of each row's first query.
        terms: see Terms.
        bias: float32 [heads or 1, q, m], instead of the rule which slots a query sees.
        size: queries of a block. It decides how numbers are rounded.
    """
    kv_heads, num_entries = keys.shape[1:3]
    grouped = query.float().unflatten(1, (kv_heads, -1))
    entries = keys.float()
    slots = torch.arange(num_entries, device=keys.device)[None, None]
    first = torch.tensor(first_slots, device=keys.device)[:, None, None, None]
    if terms.sinks is not None:
        terms = terms._replace(sinks=terms.sinks.float().view(1, kv_heads, -1))
    for start in range(0, query.shape[2], size):
        block = grouped[:, :, :, start : start + size]
        query_slots = first + torch.arange(start, start + block.shape[3], device=keys.device)
        extra, seen = None, min(num_entries, max(first_slots) + start + block.shape[3])
        by_all = min(num_entries, min(first_slots) + start + 1)
        if bias is not None:
            query_slots, seen = torch.full_like(query_slots, num_entries), num_entries
            by_all = num_entries
            part = bias[:, start : start + size]
            extra = part[None, None] if len(part) == 1 else part.unflatten(0, (kv_heads, -1))[None]
        sees = entries[:, :, :seen], query_slots, slots[..., :seen]
        yield start, attention_probabilities(DenseAttention(block, *sees, terms), extra, by_all)


def block_size(device: torch.device) -> int:
    """Of `probabilities` where speed is what counts: on a CPU half the time."""
    return SMALL_BLOCK if device.type == "cpu" else QUERY_BLOCK


def mix(chances: Tensor, values: Tensor) -> Tensor:
    """[rows, heads, queries, size]: values by their probabilities.

    Args:
        chances: float32 [rows, kv_heads, group, queries, n].
        values: float32 [rows, kv_heads, m, size], of which the first n count.
    """
    values = values[:, :, : chances.shape[-1]]
    # One product for the query heads of a group: a product of each would copy the values.
    mixed = chances.flatten(2, 3) @ values
    return mixed.unflatten(2, chances.shape[2:4]).flatten(1, 2)


def _shares(query: Tensor, keys: Tensor) -> bool:
    return query.shape[1] != keys.shape[1]
