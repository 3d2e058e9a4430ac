"""Where spilled entries go: (row, slot), a row being a layer and a KV head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paged_kv.kernels import ops

Tensor = torch.Tensor


def free_places(
    holes: tuple[Tensor, Tensor], num_rows: int, count: int, end: int
) -> tuple[Tensor, Tensor]:
    """(row, slot), in order: the holes below `count`, and all places from there to `end`.

    Args:
        holes: int64 (row, slot), [n] each; free places.
        num_rows: of the store.
        count: entries that each row has.
        end: entries that it will have.
    """
    new = torch.arange(count, end)
    row = torch.cat([holes[0], torch.arange(num_rows).repeat_interleave(len(new))])
    slot = torch.cat([holes[1], new.repeat(num_rows)])
    order = (row * end + slot).argsort()
    return row[order], slot[order]


def make_room(
    holes: tuple[Tensor, Tensor],
    count: int,
    ranks: Sequence[Tensor],
    row: Tensor,
    content: dict[str, Tensor],
    lost: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where what comes goes, (row, slot) in order, and what of it: bool [n].

    Args:
        holes: see free_places.
        count: entries that each row has.
        ranks: importance and positions, [layers, kv_heads, end] each; void in free places.
        row: int64 [n], ascending; see Spilled.
        content: see Spilled.
        lost: of the entries here and those that come, per row: the least important go.
    """
    before = [part.flatten(0, 1) for part in ranks]
    free = torch.zeros(before[0].shape, dtype=torch.bool)
    free[:, count:] = True
    free[holes] = True
    column = torch.arange(len(row)) - torch.searchsorted(row, row)
    size = len(free), int(column.max()) + 1
    absent = torch.ones(size, dtype=torch.bool)
    absent[row, column] = False
    criteria = []
    for name, old in zip(("importance", "positions"), before, strict=True):
        new = content[name].new_zeros(size)
        new[row, column] = content[name]
        criteria.append(torch.cat([old.to(new.dtype), new], -1))
    keep = torch.cat([free, absent], -1)
    gone = ops.lowest(criteria[0], criteria[1], keep, torch.tensor([lost]), lost)
    end = free.shape[1]
    target, slot = (free | gone[:, :end]).nonzero(as_tuple=True)
    return target, slot, ~gone[row, end + column]
