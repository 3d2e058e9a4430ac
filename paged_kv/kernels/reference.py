"""Attention over dense keys in plain torch: probabilities, their sums, and expected ones.

Operations on packed pages are in ops; their ground truth is packed_reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paged_kv.kernels.operands import DenseAttention, Expected
from paged_kv.kernels.rotary import Rotary

CACHED_NUMBERS = 1 << 19  # float32 numbers that a core's own cache holds


def attention_probabilities(
    attention: DenseAttention, bias: torch.Tensor | None = None, num_seen: int = 0
) -> torch.Tensor:
    """What each query gives to each entry: float32 [..., kv_heads, group, queries, entries].

    A query that sees nothing gives nothing.

    Args:
        attention: see DenseAttention.
        bias: float32, broadcasts to the result; added to the logits after the softcap.
        num_seen: so many of the first entries are seen by all queries, as the positions also say:
            a mask over all of them takes as long as the softmax.
    """
    queries, keys, query_positions, key_positions, (scale, softcap, sinks) = attention
    # One product per KV head: expanding the keys over their group would copy them.
    group, num_queries = queries.shape[-3:-1]
    logits = (queries * scale).flatten(-3, -2) @ keys.transpose(-1, -2)
    logits = logits.unflatten(-2, (group, num_queries))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    visible = key_positions[..., None, None, num_seen:] <= query_positions[..., None]
    logits[..., num_seen:].masked_fill_(~visible, -torch.inf)
    if sinks is not None:
        column = sinks[..., None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.nan_to_num_(0.0)  # a query that sees nothing


def attention_mass(attention: DenseAttention, largest: bool = False) -> torch.Tensor:
    """attention_probabilities summed over the group and the queries: [..., kv_heads, entries].

    largest: their maximum, not the sum.
    A few heads at a time, so that probabilities stay in a CPU's cache: twice as fast.
    """
    queries, keys, query_positions, key_positions, terms = attention.expanded()
    lead = queries.shape[:-3]
    states, entries = queries.flatten(0, -4), keys.flatten(0, -3)
    query_place, key_place = query_positions.flatten(0, -3), key_positions.flatten(0, -2)
    sinks = None if terms.sinks is None else terms.sinks.flatten(0, -2)
    result = torch.empty(key_place.shape, dtype=queries.dtype, device=queries.device)
    reduce = torch.amax if largest else torch.sum
    for heads in _blocks(key_place, query_place[0].numel()):
        of_heads = DenseAttention(
            states[heads],
            entries[heads],
            query_place[heads],
            key_place[heads],
            terms._replace(sinks=None if sinks is None else sinks[heads]),
        )
        reduce(attention_probabilities(of_heads), (-3, -2), out=result[heads])
    return result.unflatten(0, lead)


def fade(
    scores: torch.Tensor, probabilities: torch.Tensor, decay: float, asked: torch.Tensor
) -> torch.Tensor:
    """Scores after some more queries: each multiplies them with decay, then adds what it gives.

    In whatever chunks queries come, scores become the same. decay 1 is the sum.

    Args:
        scores: float32 [..., entries].
        probabilities: float32 [..., group, queries, entries]; 0 for what is no query.
        decay: in (0, 1].
        asked: bool, broadcasts to [..., queries]; False for what is no query: nothing fades.
    """
    if decay == 1:
        return scores + probabilities.sum((-3, -2))
    counted = asked.to(scores.dtype)
    so_far = counted.cumsum(-1)  # exact in float32: queries of one step
    count = so_far[..., -1:]
    factors = torch.pow(decay, count - so_far)
    given = factors[..., None, :] @ probabilities.sum(-3)
    return scores * torch.pow(decay, count) + given.squeeze(-2)


def expected_probabilities(
    mean: torch.Tensor,
    deviations: torch.Tensor,
    keys: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Softmax over the entries of E[exp(scale q.k)], q Gaussian; mean over the group: [..., m].

    A few heads at a time, like attention_mass.

    Args:
        mean: float32 [..., group, head_dim], of the queries.
        deviations: float32 [..., group, n, head_dim]; D^T D is the queries' covariance.
        keys: float32 [..., m, head_dim].
        hidden: bool [..., m], entries that take no part; not all of a row.
        scale: factor of the logits.
    """
    lead, (group, size) = mean.shape[:-2], mean.shape[-2:]
    means, spread = mean.flatten(0, -3), deviations.flatten(0, -4)
    entries, out = keys.flatten(0, -3), hidden.expand(*lead, -1).flatten(0, -2)
    result = torch.empty(out.shape, dtype=keys.dtype, device=keys.device)
    for part in _blocks(out, group * size):
        d, k = spread[part], entries[part]  # [heads, group, n, head_dim], [heads, m, head_dim]
        covariance = d.transpose(-1, -2) @ d  # [heads, group, head_dim, head_dim]
        wide = covariance.transpose(1, 2).flatten(2)  # one product for the whole group
        # k . covariance k of each entry and query head: [heads, m, group].
        squares = ((k @ wide).unflatten(-1, (group, size)) * k[:, :, None]).sum(-1)
        # E[exp(x)] of a Gaussian x is exp(mean + variance / 2); x = scale q.k.
        logits = k @ means[part].transpose(-1, -2) * scale + squares * (scale**2 / 2)
        logits = logits.masked_fill_(out[part][..., None], torch.finfo(logits.dtype).min)
        result[part] = logits.softmax(-2).mean(-1)
    return result.unflatten(0, lead)


def _blocks(rows: torch.Tensor, numbers: int) -> Iterator[slice]:
    """Slices of rows [rows, m] with so few that m * numbers of each fit a core's cache."""
    limit = CACHED_NUMBERS if rows.device.type == "cpu" else 64 * CACHED_NUMBERS
    at_once = max(1, limit // (rows.shape[-1] * numbers))
    return (slice(start, start + at_once) for start in range(0, len(rows), at_once))


def expected_logarithm(keys: torch.Tensor, expected: Expected) -> torch.Tensor:
    """float32 [layers, events, kv_heads, group, m]; see Expected.

    Args:
        keys: float32 [layers, events, kv_heads, m, head_dim], before RoPE.
        expected: see Expected.
    """
    # One product: factors [layers, 1, kv_heads, group, 2 head_dim], powers [..., 2 head_dim, m].
    factors = torch.cat([expected.linear, expected.quadratic], -1)[:, None]
    powers = torch.cat([keys, keys.square()], -1)
    found: torch.Tensor = factors @ powers.mT - expected.normaliser[:, None, :, :, None]
    return found


def expected_attention(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    expected: Expected,
) -> torch.Tensor:
    """Attention, at most 1 each, averaged over the group, times the norm of the value.

    Operands: see ops.expected_attention.
    """
    before = rotary.rotate(keys, positions, back=True)
    attention = expected_logarithm(before, expected).clamp_max(0).exp().mean(-2)
    rated: torch.Tensor = attention * values.norm(dim=-1)
    return rated
