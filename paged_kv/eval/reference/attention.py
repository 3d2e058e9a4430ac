"""Attention of the reference engine where its probabilities are wanted, or logits are changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paged_kv.eval.reference.layer_cache import LayerCache
from paged_kv.hf import paged_attention
from paged_kv.kernels.operands import Terms
from paged_kv.policies.base import Policy

Tensor = torch.Tensor


def explicit(
    cache: LayerCache,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    terms: Terms,
    bias: Tensor | None,
    scorers: Mapping[str, Policy],
) -> Tensor:
    """[heads, q, size]: attention by its probabilities, which are added to the cache's scores.

    Args:
        cache: of the layer; its last q entries are new.
        query: [heads, q, head_dim].
        keys: [kv_heads, m, head_dim], as they are attended to.
        values: [kv_heads, m, size].
        positions: int64 [q], of the queries.
        terms: how the layer computes attention.
        bias: float32, added to the logits; None for none.
        scorers: fields of the cache, and who adds the probabilities up in each.
    """
    outputs = []
    first = [cache.size - query.shape[1]]
    size = paged_attention.block_size(query.device)
    blocks = paged_attention.probabilities(query[None], keys[None], first, terms, bias, size)
    for start, chances in blocks:
        outputs.append(paged_attention.mix(chances, values[None])[0])
        block = positions[None, start : start + chances.shape[3]]
        for name, policy in scorers.items():
            scores = cache[name][:, : chances.shape[-1]]
            scores.copy_(policy.accumulate(scores[None], chances, block)[0])
    return torch.cat(outputs, 1)


def plain(query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[heads, q, size]: attention whose probabilities nobody wants; see explicit."""
    states = query[None], keys[None], values[None]
    if bias is not None:
        return paged_attention.masked(*states, bias[None], scale)[0]
    first_slot = keys.shape[1] - query.shape[1]
    return paged_attention.fused(*states, [first_slot], scale)[0]


def outside_window(
    window: int | None, num_queries: int, num_entries: int, device: torch.device
) -> Tensor | None:
    """float32 [1, queries, entries]: -inf outside a sliding window over entries in order."""
    if window is None or window >= num_entries:
        return None
    entries = torch.arange(num_entries, device=device)
    queries = entries[num_entries - num_queries :, None]
    inside = (entries <= queries) & (entries > queries - window)
    return torch.where(inside, 0.0, -torch.inf)[None]
