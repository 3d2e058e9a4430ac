"""Packed pages of a stack of layers, for compactions: what kernels.pages is for other pages."""

from __future__ import annotations

import torch

from paged_kv.kernels import ops
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.pages import Index

Tensor = torch.Tensor


class PackedPart:
    """The keys, or the values, of a stack of packed pages; see pages.Part.

    Args:
        stack: uint8 [layers, pages, kv_heads, block_bytes].
        layout: of the blocks.
        name: "key" or "value".
    """

    def __init__(self, stack: Tensor, layout: PageLayout, name: str) -> None:
        self.stack = stack
        self.layout = layout
        self.name = name
        self.size: int = getattr(layout, name).size

    def gather(self, layers: Tensor, pages: Tensor) -> Tensor:
        """See ops.gather."""
        return ops.gather(self.stack, self.layout, self.name, layers, pages)

    def take(self, index: Index) -> Tensor:
        """See ops.take."""
        return ops.take(self.stack, self.layout, self.name, index)

    def move(self, source: Index, target: Index) -> None:
        """See ops.move."""
        ops.move(self.stack, self.layout, self.name, source, target)

    def store(self, index: Index, numbers: Tensor) -> None:
        """See ops.store."""
        ops.store(self.stack, self.layout, self.name, index, numbers)


class PackedPages:
    """Keys and values of a stack of equal layers; see pages.Pages.

    Args:
        stack: see PackedPart.
        layout: see PackedPart.
    """

    def __init__(self, stack: Tensor, layout: PageLayout) -> None:
        self.keys = PackedPart(stack, layout, "key")
        self.values = PackedPart(stack, layout, "value")
        self.num_layers, self.num_pages, self.num_heads = stack.shape[:3]
        self.page_size = layout.page_size
        self.device = stack.device

    def move(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Copies entries between slots in all layers and heads; see reference.move_entries.

        Args:
            source: (page ids, offsets in the page), int64 [num_moves] each.
            target: the same of the slots to write.
        """
        layer = torch.arange(self.num_layers, device=self.device)[:, None, None]
        head = torch.arange(self.num_heads, device=self.device)[:, None]
        for part in (self.keys, self.values):
            part.move((layer, source[0], head, source[1]), (layer, target[0], head, target[1]))
