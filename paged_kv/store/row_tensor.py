"""Something of equal size for each row (a running sequence) in each layer, in one tensor."""

from __future__ import annotations

import copy
from typing import TypeVar

import numpy as np
import torch

from paged_kv.policies.base import Int64s
from paged_kv.store.ragged import to_device

Tensor = torch.Tensor
T = TypeVar("T", bound="RowTensor")


class RowTensor:
    """[layers, rows, ...]; there is no memory before bind.

    Args:
        num_layers: layers.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.num_rows = 0
        self.tensor: Tensor | None = None
        self._by_layer: list[Tensor] = []  # views of it

    def bind(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Takes memory: `shape` of what each row has in a layer."""
        size = (self.num_layers, self.num_rows, *shape)
        self._set(torch.zeros(size, dtype=dtype, device=device))

    def _set(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._by_layer = list(tensor.unbind(0))  # once: a view for each layer and step adds up

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return 0 if self.tensor is None else self.tensor.nbytes

    def layer(self, layer: int) -> Tensor:
        """[rows, ...] of one layer."""
        return self._by_layer[layer]

    def row(self, row: int) -> list[Tensor]:
        """[layers, ...] of one row; nothing before bind."""
        return [] if self.tensor is None else [self.tensor[:, row]]

    def add_rows(self, num_rows: int) -> None:
        """Rows of zeros, at the end."""
        self.num_rows += num_rows
        if self.tensor is not None and num_rows:
            size = (self.num_layers, num_rows, *self.tensor.shape[2:])
            self._set(torch.cat([self.tensor, self.tensor.new_zeros(size)], 1))

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        stays = np.array_equal(indices, np.arange(self.num_rows))
        self.num_rows = len(indices)
        if self.tensor is not None and not stays:
            index = to_device(indices, self.tensor.device)
            self._set(self.tensor.index_select(1, index))

    def copy(self: T) -> T:
        """One that shares nothing with this."""
        other = copy.copy(self)
        if self.tensor is not None:
            other._set(self.tensor.clone())
        return other
