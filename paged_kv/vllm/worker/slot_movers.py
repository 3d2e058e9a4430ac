"""Moves for policies that decide by position alone: the same slots in all layers and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from paged_kv.kernels.page_layout import PageLayout
from paged_kv.policies.base import Int64s, Moves
from paged_kv.store.ragged import to_device
from paged_kv.vllm.worker.block_table import physical
from paged_kv.vllm.worker.layer_group import movers


class SlotMovers:
    """What moves entries of each metadata builder's layers, made when it is first needed.

    Args:
        layers: Attention layers by name.
        layouts: of those whose pages are packed.
    """

    def __init__(self, layers: dict[str, Any], layouts: Mapping[str, PageLayout]) -> None:
        self.layers, self.layouts = layers, layouts
        self._movers: dict[tuple[str, ...], list[Callable[..., None]]] = {}

    def clear(self) -> None:
        """Forgets the caches: they have been allocated anew."""
        self._movers.clear()

    def move(
        self,
        names: tuple[str, ...],
        moves: Moves,
        rows: Int64s,
        table: torch.Tensor,
        block_size: int,
    ) -> None:
        """Copies entries between slots.

        Args:
            names: of a builder's layers.
            moves: logical slots.
            rows: int64 [num_moves], of the table.
            table: [rows, kernel pages], page ids.
            block_size: of the kernel.
        """
        row = to_device(rows, table.device)
        source, target = (
            physical(slots, row, table, block_size) for slots in (moves.source, moves.target)
        )
        if names not in self._movers:
            self._movers[names] = movers(names, self.layers, self.layouts)
        for move in self._movers[names]:
            move(source, target)
