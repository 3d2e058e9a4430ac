"""Keys and values of a stack of pages."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.kernels.page_layout import PageLayout
from paged_kv.store.entries import Entries, NativeEntries, Number, PackedEntries

Tensor = torch.Tensor


class Pages(NamedTuple):
    """Keys and values of a stack of equal layers.

    Args:
        keys: of all pages.
        values: of the same pages.
    """

    keys: Entries
    values: Entries

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return self.keys.num_layers

    @property
    def num_pages(self) -> int:
        """Pages of each layer."""
        return self.keys.num_pages

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.keys.num_heads

    @property
    def page_size(self) -> int:
        """Entries per page."""
        return self.keys.page_size

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.device

    def move(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Copies entries between slots in all layers and heads; see move_entries.

        Args:
            source: (page ids, offsets in the page), int64 [num_moves] each.
            target: the same of the slots to write.
        """
        layer = torch.arange(self.num_layers, device=self.device)[:, None, None]
        head = torch.arange(self.num_heads, device=self.device)[:, None]
        read = layer, source[0], head, source[1]
        write = layer, target[0], head, target[1]
        for entries in self:
            entries.move(read, write)


def native_pages(
    stack: Tensor, key_size: int, key: Number, value: Number, elements: Tensor | None = None
) -> Pages:
    """Keys and values side by side in an engine's own pages.

    Args:
        stack: see NativeEntries.
        key_size: elements of a key; the rest of an entry is its value.
        key: what a key's elements mean.
        value: what a value's elements mean.
        elements: see NativeEntries.
    """
    return Pages(
        NativeEntries(stack, slice(0, key_size), key, elements),
        NativeEntries(stack, slice(key_size, None), value, elements),
    )


def packed_pages(stack: Tensor, layout: PageLayout) -> Pages:
    """Keys and values in packed pages; see PackedEntries."""
    return Pages(PackedEntries(stack, layout, "key"), PackedEntries(stack, layout, "value"))


def move_entries(
    stack: Tensor,
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    elements: Tensor | None = None,
) -> None:
    """Copies entries between slots, in all layers and KV heads at once; reads all, then writes.

    Args:
        stack: see NativeEntries.
        source: (page ids, offsets in the page) of the entries to read, int64 [num_moves] each.
        target: the same of the slots to write.
        elements: see NativeEntries.
    """
    (source_page, source_offset), (target_page, target_offset) = source, target
    if elements is None:
        stack[:, target_page, :, target_offset] = stack[:, source_page, :, source_offset]
        return
    read = source_page[:, None], elements[source_offset]
    write = target_page[:, None], elements[target_offset]
    stack[:, write[0], :, write[1]] = stack[:, read[0], :, read[1]]
