"""What queries give to dense keys, by Triton: see reference.attention_mass."""

from __future__ import annotations

import torch

from paged_kv.kernels.operands import DenseAttention
from paged_kv.kernels.triton.mass_kernels import mass_kernel, total_kernel

Tensor = torch.Tensor
QUERIES, ENTRIES = 16, 32  # of a program's block


def attention_mass(attention: DenseAttention, largest: bool = False) -> Tensor:
    """What each entry gets from all queries of its KV head; see protocol.Kernels."""
    queries, keys, query_positions, key_positions, terms = attention.expanded()
    lead, (group, num_queries, size) = queries.shape[:-3], queries.shape[-3:]
    num_entries, count = keys.shape[-2], group * num_queries
    states = queries.reshape(-1, count, size).contiguous()  # reshape gives views of slices
    num_heads = len(states)
    query_places, key_places = query_positions.contiguous(), key_positions.contiguous()
    entries, sinks = keys.contiguous(), terms.sinks
    if sinks is not None:  # of each query
        sinks = sinks[..., None].expand(*lead, group, num_queries).contiguous()
    result = torch.empty((*lead, num_entries), dtype=torch.float32, device=queries.device)
    if not result.numel() or not count:
        return result.zero_()
    totals = torch.empty((num_heads, count), dtype=torch.float32, device=queries.device)
    sizes = {"SIZE": size, "QUERIES": QUERIES, "ENTRIES": ENTRIES, "SOFTCAP": bool(terms.softcap)}
    numbers = count, num_entries, terms.scale, terms.softcap
    operands = states, query_places, entries, key_places
    fusion = {"enable_fp_fusion": True}
    grid = num_heads, -(-count // QUERIES)
    total_kernel[grid](totals, *operands, sinks, *numbers, **sizes, **fusion)
    grid = num_heads, -(-num_entries // ENTRIES)
    mass_kernel[grid](result, totals, *operands, *numbers, LARGEST=largest, **sizes, **fusion)
    return result
