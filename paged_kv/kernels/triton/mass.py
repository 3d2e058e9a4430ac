"""What queries give to dense keys, by Triton: reference.attention_mass."""

from __future__ import annotations

import torch

from paged_kv.kernels.triton.mass_kernels import mass_kernel, total_kernel

Tensor = torch.Tensor
QUERIES, ENTRIES = 16, 32  # of a program's block


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention summed over the group and the queries: [..., kv_heads, entries].

    The arguments are those of reference.attention_mass.
    """
    lead, (group, num_queries, size) = queries.shape[:-3], queries.shape[-3:]
    num_entries, count = keys.shape[-2], group * num_queries
    states = queries.reshape(-1, count, size)
    num_heads = len(states)
    held = key_positions.expand(*lead, num_entries).contiguous()
    asked = query_positions.expand(*lead, group, num_queries).contiguous()
    entries = keys.expand(*lead, num_entries, size).contiguous()
    extra = None
    if sinks is not None:
        extra = sinks.float().expand(*lead, group)[..., None].expand(*lead, group, num_queries)
        extra = extra.contiguous()
    result = torch.empty((*lead, num_entries), dtype=torch.float32, device=queries.device)
    if not result.numel() or not count:
        return result.zero_()
    totals = torch.empty((num_heads, count), dtype=torch.float32, device=queries.device)
    sizes = {"SIZE": size, "QUERIES": QUERIES, "ENTRIES": ENTRIES, "SOFTCAP": bool(softcap)}
    numbers = count, num_entries, scale, softcap
    fusion = {"enable_fp_fusion": True}
    grid = num_heads, -(-count // QUERIES)
    total_kernel[grid](totals, states, asked, entries, held, extra, *numbers, **sizes, **fusion)
    grid = num_heads, -(-num_entries // ENTRIES)
    mass_kernel[grid](result, totals, states, asked, entries, held, *numbers, **sizes, **fusion)
    return result
