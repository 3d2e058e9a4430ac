"""Attention of a chunk to all that a layer holds and, causally, to itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from paged_kv.hf.seams import Terms

Tensor = torch.Tensor
QUERY_BLOCK = 512  # queries whose probabilities are held at once


def fused(query: Tensor, keys: Tensor, values: Tensor, terms: Terms) -> Tensor:
    """[heads, n, head_dim], by SDPA, which knows neither softcap nor sinks.

    Args:
        query: float32 [heads, n, head_dim], of the last n entries.
        keys: float32 [kv_heads, m, head_dim].
        values: the same.
        terms: scale and sliding window.
    """
    num_queries, num_entries = query.shape[1], keys.shape[1]
    everything = terms.sliding_window is None or terms.sliding_window >= num_entries
    if num_queries == 1 and everything:
        # Query heads of a group as queries of one head: nothing is repeated.
        grouped = query.unflatten(0, (len(keys), -1))[:, :, 0][None]
        output = F.scaled_dot_product_attention(
            grouped, keys[None], values[None], scale=terms.scale
        )
        return output[0].flatten(0, 1)[:, None]
    causal = num_queries == num_entries and everything
    mask = None if causal else visible(num_queries, num_entries, terms, query.device)
    output = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=causal,
        scale=terms.scale,
        enable_gqa=True,
    )
    return output[0]


def probabilities(query: Tensor, keys: Tensor, terms: Terms) -> Iterator[tuple[int, Tensor]]:
    """(index of the first query, [kv_heads, group, queries, m]) for block after block of queries.

    Args:
        query: float32 [heads, n, head_dim], of the last n entries.
        keys: float32 [kv_heads, m, head_dim].
        terms: see Terms.
    """
    grouped = query.unflatten(0, (len(keys), -1))
    mask = visible(query.shape[1], keys.shape[1], terms, query.device)
    for start in range(0, query.shape[1], QUERY_BLOCK):
        block = grouped[:, :, start : start + QUERY_BLOCK]
        logits = (block.flatten(1, 2) @ keys.mT * terms.scale).unflatten(1, block.shape[1:3])
        if terms.softcap:
            logits = torch.tanh(logits / terms.softcap) * terms.softcap
        logits = logits.masked_fill(~mask[start : start + QUERY_BLOCK], -torch.inf)
        if terms.sinks is None:
            yield start, logits.softmax(-1)
        else:
            sinks = terms.sinks.view(*block.shape[:2], 1, 1).expand(*block.shape[:3], 1)
            yield start, torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def visible(num_queries: int, num_entries: int, terms: Terms, device: torch.device) -> Tensor:
    """bool [queries, entries]; a layer with a sliding window holds everything, in order."""
    mask = torch.ones(num_queries, num_entries, dtype=torch.bool, device=device)
    mask = mask.tril(num_entries - num_queries)
    if terms.sliding_window is None:
        return mask
    return mask.triu(num_entries - num_queries - terms.sliding_window + 1)
