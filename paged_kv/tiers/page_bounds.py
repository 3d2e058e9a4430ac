"""A page of spilled entries in short: the least and the largest number in each channel of its keys.

From these follows a bound of a query's logits with all of the page's keys, without reading them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
PAGE_SIZE = 32  # entries that have one summary


class PageBounds:
    """Summaries of the pages of some layers, [layers, kv_heads, pages, key_size] each.

    Args:
        shape: (layers, KV heads).
        key_size: numbers of a key.
        dtype: of the numbers.
    """

    def __init__(self, shape: tuple[int, int], key_size: int, dtype: torch.dtype) -> None:
        self._least = torch.empty(*shape, 0, key_size, dtype=dtype)
        self._largest = self._least

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self._least.nbytes + self._largest.nbytes

    def read(self, layers: Tensor, num_entries: int) -> tuple[Tensor, Tensor]:
        """(least, largest) of the pages of some layers that hold so many entries."""
        num_pages = -(-num_entries // PAGE_SIZE)
        return self._least[layers, :, :num_pages], self._largest[layers, :, :num_pages]

    def update(
        self,
        row: Tensor,
        slot: Tensor,
        end: int,
        capacity: int,
        keys_of: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Summarizes anew the pages in which slots have been written.

        Args:
            row: int64 [n], layer * KV heads + head.
            slot: int64 [n].
            end: entries that each of these rows holds.
            capacity: entries that there is room for in a row.
            keys_of: reads keys [..., key_size] of (row, slot).
        """
        num_pages = -(-capacity // PAGE_SIZE)
        if self._least.shape[2] < num_pages:
            self._least, self._largest = (
                grown(bound, num_pages) for bound in (self._least, self._largest)
            )
        pages = torch.unique(row * num_pages + slot // PAGE_SIZE)
        slots = (pages % num_pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        rows = (pages // num_pages)[:, None].expand_as(slots)
        # Past the end the last entry is read once more, which changes neither bound.
        keys = keys_of(rows, slots.clamp_max(end - 1))
        self._least.flatten(0, 2)[pages] = keys.amin(1)
        self._largest.flatten(0, 2)[pages] = keys.amax(1)


def grown(tensor: Tensor, size: int) -> Tensor:
    """The same [layers, kv_heads, n, ...] with room for `size`."""
    new = tensor.new_zeros(*tensor.shape[:2], size, *tensor.shape[3:])
    new[:, :, : tensor.shape[2]] = tensor
    return new
