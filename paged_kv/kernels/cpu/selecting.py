"""Calls of lowest, pair_moves and first_places: operands as rows, and memory for what is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paged_kv.kernels.cpu import structs
from paged_kv.kernels.index import common_shape

Tensor = torch.Tensor


class Lowest:
    """A call of lowest; operands as selection.lowest has them, and kept until it is over.

    Attributes:
        work: the struct.
        chosen: bool [..., m], to be written.
    """

    def __init__(
        self, scores: Tensor, positions: Tensor, keep: Tensor, count: Tensor, limit: int
    ) -> None:
        shape = common_shape(scores, positions)
        self.chosen = torch.empty(shape, dtype=torch.bool)
        self._operands = [
            _rows(scores.float(), shape),
            _rows(positions.long(), shape),
            _rows(keep, shape),
            _rows(count.long()[..., None], (*shape[:-1], 1)),
        ]
        self.work = structs.LowestStruct(
            *map(structs.rows_struct, self._operands),
            self.chosen.data_ptr(),
            _leading(self._operands[0]),
            shape[-1],
            limit,
        )


class Pairs:
    """A call of pair_moves or, with the mask in both places, of first_places.

    Operands are as in selection, and kept until it is over.

    Attributes:
        work: the struct.
        source: int64 [..., limit], to be written.
        target: the same.
    """

    def __init__(self, losers: Tensor, freed: Tensor, limit: int, spare: int) -> None:
        shape = common_shape(losers, freed)
        self.source, self.target = torch.empty(2, *shape[:-1], limit, dtype=torch.int64).unbind()
        self._operands = [_rows(losers, shape), _rows(freed, shape)]
        self.work = structs.PairsStruct(
            *map(structs.rows_struct, self._operands),
            self.source.data_ptr(),
            self.target.data_ptr(),
            _leading(self._operands[0]),
            shape[-1],
            limit,
            spare,
        )


def _rows(operand: Tensor, shape: Sequence[int]) -> Tensor:
    """The same as [..., m] with at most three leading dimensions; copied only if it must be."""
    rows = operand.expand(shape)
    if rows.dim() > 4:
        rows = rows.flatten(0, -4)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _leading(rows: Tensor) -> Any:
    return (structs.Number * 3)(*(1, 1, 1, *rows.shape[:-1])[-3:])
