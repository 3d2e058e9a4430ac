"""Where entries lie in pages: indices by (layer, page id, KV head, offset in the page)."""

from __future__ import annotations

import torch

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""int64 (layer, page id, KV head, offset in the page), of shapes that broadcast."""
NOWHERE = torch.iinfo(torch.int64).min
"""The offset of what is not to be stored; every other one outside a page is an error."""


def common_shape(*tensors: torch.Tensor) -> torch.Size:
    """What they broadcast to. torch.broadcast_shapes is Python, and twenty times as slow."""
    return torch.broadcast_tensors(*tensors)[0].shape


def region_index(layers: torch.Tensor, pages: torch.Tensor, heads: int, page_size: int) -> Index:
    """All slots of some pages, as index of [layers, sequences, heads, n, page_size].

    Args:
        layers: int64 [layers].
        pages: int64 [sequences, n], page ids; or [layers, sequences, n], where that differs.
        heads: number of KV heads.
        page_size: entries per page.
    """
    device = pages.device
    return (
        layers[:, None, None, None, None],
        pages[..., None, :, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(page_size, device=device),
    )


def slot_index(layers: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, size: int) -> Index:
    """Some slots of a region, as index of [layers, sequences, heads, columns].

    Args:
        layers: int64 [layers].
        pages: page ids of each region; see region_index.
        slots: int64 [layers, sequences, heads, columns], counted from the region's start.
        size: entries per page.
    """
    head = torch.arange(slots.shape[2], device=pages.device)[:, None]
    table = pages.expand(*slots.shape[:2], -1)[:, :, None].expand(*slots.shape[:3], -1)
    return layers[:, None, None, None], table.gather(-1, slots // size), head, slots % size


def entry_index(layers: torch.Tensor, pages: torch.Tensor, entries: Index, size: int) -> Index:
    """Some entries of a region, as index of [n].

    Args:
        layers: int64 [layers].
        pages: page ids of each region; see region_index.
        entries: int64 (layer, sequence, head, slot) of the region, [n] each.
        size: entries per page.
    """
    layer, sequence, head, slot = entries
    table = pages.expand(len(layers), *pages.shape[-2:])
    return layers[layer], table[layer, sequence, slot // size], head, slot % size
