"""Every operation on pages in plain torch: the ground truth for the other kernels."""

from __future__ import annotations

import torch


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
