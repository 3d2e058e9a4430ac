"""Every operation on pages in plain torch: the ground truth for the other kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CACHED_NUMBERS = 1 << 19  # float32 numbers that a core's own cache holds


def move_entries(
    pages: torch.Tensor,
    source: tuple[torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor],
    elements: torch.Tensor | None = None,
) -> None:
    """Copies entries between slots, in all layers and KV heads at once; reads all, then writes.

    Args:
        pages: the logical view [layers, pages, heads, page_size, content], of any strides; or, with
            elements, [layers, pages, heads, page_size * content], an entry's elements scattered.
        source: (page ids, offsets in the page) of the entries to read, int64 [num_moves] each.
        target: the same of the slots to write.
        elements: int64 [page_size, content]: where in a page the elements of each entry lie.
    """
    source_page, source_offset = source
    target_page, target_offset = target
    if elements is None:
        pages[:, target_page, :, target_offset] = pages[:, source_page, :, source_offset]
        return
    read = source_page[:, None], elements[source_offset]
    write = target_page[:, None], elements[target_offset]
    pages[:, write[0], :, write[1]] = pages[:, read[0], :, read[1]]


def attention_probabilities(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each query gives to each entry: float32 [..., kv_heads, group, queries, entries].

    Args:
        queries: float32 [..., kv_heads, group, queries, head_dim], after RoPE.
        keys: float32 [..., kv_heads, entries, head_dim].
        query_positions: int64, broadcasts to [..., kv_heads, group, queries]; -1 for no query.
        key_positions: int64, broadcasts to [..., kv_heads, entries]; a query does not see larger
            ones than its own.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        sinks: float32 [..., kv_heads, group], logits that take part in the softmax and get nothing.
        bias: float32, broadcasts to the result; added to the logits after the softcap.
    """
    # One product per KV head: expanding the keys over their group would copy them.
    group, num_queries = queries.shape[-3:-1]
    logits = (queries * scale).flatten(-3, -2) @ keys.transpose(-1, -2)
    logits = logits.unflatten(-2, (group, num_queries))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    visible = key_positions[..., None, None, :] <= query_positions[..., None]
    logits = logits.masked_fill_(~visible, -torch.inf)
    if sinks is not None:
        column = sinks[..., None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.nan_to_num_(0.0)  # a query that sees nothing


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """attention_probabilities summed over the group and the queries: [..., kv_heads, entries].

    A few heads at a time, so that probabilities stay in a CPU's cache: twice as fast.
    """
    lead = queries.shape[:-3]
    states = queries.flatten(0, -4)
    entries = keys.expand(*lead, *keys.shape[-2:]).flatten(0, -3)
    asked = query_positions.expand(*lead, *queries.shape[-3:-1]).flatten(0, -3)
    held = key_positions.expand(*lead, -1).flatten(0, -2)
    extra = None if sinks is None else sinks.expand(*lead, -1).flatten(0, -2)
    result = torch.empty(held.shape, dtype=queries.dtype, device=queries.device)
    for part in _blocks(held, asked[0].numel()):
        terms = scale, softcap, None if extra is None else extra[part]
        probabilities = attention_probabilities(
            states[part], entries[part], asked[part], held[part], *terms
        )
        torch.sum(probabilities, (-3, -2), out=result[part])
    return result.unflatten(0, lead)


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
        own, k = spread[part], entries[part]
        covariance = own.transpose(-1, -2) @ own  # [heads, group, head_dim, head_dim]
        wide = covariance.transpose(1, 2).flatten(2)  # one product for the whole group
        squares = ((k @ wide).unflatten(-1, (group, size)) * k[:, :, None]).sum(-1)
        logits = k @ means[part].transpose(-1, -2) * scale + squares * (scale**2 / 2)
        logits = logits.masked_fill_(out[part][..., None], torch.finfo(logits.dtype).min)
        result[part] = logits.softmax(-2).mean(-1)
    return result.unflatten(0, lead)


def _blocks(rows: torch.Tensor, numbers: int) -> Iterator[slice]:
    """Slices of rows [rows, m] with so few that m * numbers of each fit a core's cache."""
    limit = CACHED_NUMBERS if rows.device.type == "cpu" else 64 * CACHED_NUMBERS
    at_once = max(1, limit // (rows.shape[-1] * numbers))
    return (slice(start, start + at_once) for start in range(0, len(rows), at_once))


def lowest(
    scores: torch.Tensor,
    positions: torch.Tensor,
    keep: torch.Tensor,
    count: torch.Tensor,
    limit: int,
) -> torch.Tensor:
    """bool [..., m]: the entries with the lowest (score, position), `count` of each row.

    Args:
        scores: float32 [..., m].
        positions: int64 [..., m], below 2**31 where keep is False; distinct in a row.
        keep: bool [..., m], entries that cannot be chosen.
        count: int64, broadcasts to [...]: how many to choose; never more than may be.
        limit: the largest count, known on the host.
    """
    order = sort_keys(scores, positions).masked_fill(keep, torch.iinfo(torch.int64).max)
    lowest = order.topk(limit, dim=-1, largest=False, sorted=True).indices
    chosen = torch.arange(limit, device=scores.device) < count[..., None]
    result = torch.zeros_like(keep.expand(order.shape), memory_format=torch.contiguous_format)
    return result.scatter_(-1, lowest, chosen.expand(lowest.shape))


def sort_keys(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 [..., m]: in the order of (score, position), exactly.

    Args:
        scores: float32 [..., m], not NaN.
        positions: int64 [..., m], from 0 to 2**31 - 1; keys of others mean nothing.
    """
    # Floats as integers of the same order, with the position below them.
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: there is only one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | positions


def pair_moves(
    losers: torch.Tensor, freed: torch.Tensor, limit: int, spare: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries drop into which holes: (source, target), int64 [..., limit] each.

    Survivors of the freed places go, in their order, to the losers' places that stay. A row with
    fewer than `limit` moves repeats one of them; one without any moves an entry onto itself.
    Nothing depends on values, so a GPU need not be waited for.

    Args:
        losers: bool [..., m]; as many of each row as it has freed places.
        freed: bool, broadcasts to [..., m]: places that are freed.
        limit: the most losers of a row.
        spare: a place that stays, in every row.
    """
    size = losers.shape[-1]
    source = first_places(freed & ~losers, limit)
    target = first_places(losers & ~freed, limit)
    none = source[..., :1] == size
    spare_source = torch.where(none, spare, source[..., :1])
    spare_target = torch.where(none, spare, target[..., :1])
    missing = source == size
    return torch.where(missing, spare_source, source), torch.where(missing, spare_target, target)


def first_places(mask: torch.Tensor, limit: int) -> torch.Tensor:
    """int64 [..., limit]: the first indices where mask [..., m] holds, in order, then m."""
    size = mask.shape[-1]
    places = torch.arange(size, device=mask.device).masked_fill(~mask, size)
    return places.topk(limit, dim=-1, largest=False, sorted=True).values
