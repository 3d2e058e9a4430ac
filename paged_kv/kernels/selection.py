"""Which entries go, and where survivors move: for policies and tiers, alike on every device.

Sizes are known on the host and nothing is read back, so that a GPU is never waited for.
"""

from __future__ import annotations

import torch


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
    places = order.topk(limit, dim=-1, largest=False, sorted=True).indices
    chosen = torch.arange(limit, device=scores.device) < count[..., None]
    result = torch.zeros_like(keep.expand(order.shape), memory_format=torch.contiguous_format)
    return result.scatter_(-1, places, chosen.expand(places.shape))


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

    Three losers, hence three places freed, here at the head; a hole is a loser's place that stays:

        slot       0    1    2    3    4    5    6
        losers     x              x         x
        freed      f    f    f
        source          1    2                       survivors of what is freed
        target                    3         5        holes
        moves           1 ------> 3
                             2 -----------> 5
                   (1 -> 3 again, if limit is 3)

    Args:
        losers: bool [..., m]; as many of each row as it has freed places.
        freed: bool, broadcasts to [..., m]: places that are freed.
        limit: the most losers of a row.
        spare: a place that stays, in every row.
    """
    size = losers.shape[-1]
    # A row has as many survivors to move as holes: freed places and losers are equally many, and
    # freed places of losers are missing from both. So the columns of both lists pair up.
    source = first_places(freed & ~losers, limit)
    target = first_places(losers & ~freed, limit)
    # What fills the columns that a row does not need: its first move, or, where there is none,
    # the spare place onto itself. Written twice with the same, it does no harm.
    no_move = source[..., :1] == size
    repeated_source = torch.where(no_move, spare, source[..., :1])
    repeated_target = torch.where(no_move, spare, target[..., :1])
    # Every row has `limit` columns, whatever its number of moves: that number is on the device.
    unused = source == size
    source = torch.where(unused, repeated_source, source)
    return source, torch.where(unused, repeated_target, target)


def first_places(mask: torch.Tensor, limit: int) -> torch.Tensor:
    """int64 [..., limit]: the first indices where mask [..., m] holds, in order, then m."""
    size = mask.shape[-1]
    # A place that holds is its own index, another one comes after all of them.
    places = torch.arange(size, device=mask.device).masked_fill(~mask, size)
    # The smallest in order; unlike nonzero, of a size that the host knows.
    return places.topk(limit, dim=-1, largest=False, sorted=True).values
