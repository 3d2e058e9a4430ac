"""What a page holds in the layers of one group, as bytes of a host slot, and back.

    slot | layers of a stack: pages, side data | the next stack ... |

The pages of a stack of layers are copied as they lie in memory, or, if the swap has a format of its
own that is smaller, decoded and encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from paged_kv.kernels import ops
from paged_kv.kernels.index import Index, region_index
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.store.pages import Pages

Tensor = torch.Tensor
ALIGNMENT = 64  # bytes; of every part of a slot
PAGES_AT_ONCE = 16  # decoded numbers are large


class SlotPart(Protocol):
    """Some of what a page holds: num_bytes of it."""

    num_bytes: int

    def save(self, page_ids: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Writes each page to its row, uint8 [num_bytes] in host memory."""

    def load(self, page_ids: Sequence[int], rows: Sequence[Tensor], last: int) -> None:
        """The reverse. last: entries that the last page holds; this step writes behind them."""


class Raw:
    """Memory as it is: of each page the same part of a tensor.

    Args:
        tensor: [layers, pages, ...].
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = (len(tensor), *tensor.shape[2:])
        self.num_bytes = math.prod(self.shape) * tensor.element_size()

    def save(self, page_ids: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Writes each page to its row. Copies of a GPU's pages are in stream order."""
        for page, row in zip(page_ids, rows, strict=True):
            self._numbers(row).copy_(self.tensor[:, page], non_blocking=True)

    def load(self, page_ids: Sequence[int], rows: Sequence[Tensor], last: int) -> None:
        """The reverse of save."""
        for page, row in zip(page_ids, rows, strict=True):
            self.tensor[:, page].copy_(self._numbers(row), non_blocking=True)

    def _numbers(self, row: Tensor) -> Tensor:
        return row.view(self.tensor.dtype).view(self.shape)


class Side(Raw):
    """Side data: of the slots that this step writes, it is new already when pages are loaded.

    Args:
        tensor: [layers, pages, ..., page_size].
    """

    def load(self, page_ids: Sequence[int], rows: Sequence[Tensor], last: int) -> None:
        """The reverse of save; of the last page, its first `last` entries."""
        super().load(page_ids[:-1], rows[:-1], last)
        old = self._numbers(rows[-1])[..., :last]
        self.tensor[:, page_ids[-1], ..., :last].copy_(old, non_blocking=True)


class Converted:
    """Keys and values in another format than the pages'.

    Args:
        pages: of equal layers.
        layout: of the blocks in host memory.
    """

    def __init__(self, pages: Pages, layout: PageLayout) -> None:
        self.pages = pages
        self.layout = layout
        self.layers = torch.arange(pages.num_layers, device=pages.device)
        self.num_bytes = pages.num_layers * pages.num_heads * layout.block_bytes

    def save(self, page_ids: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Encodes each page to its row; numbers also where nobody has written yet (may be NaN)."""
        for start in range(0, len(page_ids), PAGES_AT_ONCE):
            blocks, ids, block_ids = self._chunk(page_ids[start : start + PAGES_AT_ONCE])
            for name, part in (("key", self.pages.keys), ("value", self.pages.values)):
                numbers = part.gather(self.layers, ids[None]).unflatten(-2, (len(ids), -1))
                ops.store(blocks, self.layout, name, self._index(block_ids), numbers.nan_to_num())
            Raw(blocks).save(range(len(ids)), rows[start : start + PAGES_AT_ONCE])

    def load(self, page_ids: Sequence[int], rows: Sequence[Tensor], last: int) -> None:
        """The reverse of save; of the last page, its first `last` entries."""
        for start in range(0, len(page_ids), PAGES_AT_ONCE):
            blocks, ids, block_ids = self._chunk(page_ids[start : start + PAGES_AT_ONCE])
            Raw(blocks).load(range(len(ids)), rows[start : start + PAGES_AT_ONCE], last)
            for name, part in (("key", self.pages.keys), ("value", self.pages.values)):
                numbers = ops.gather(blocks, self.layout, name, self.layers, block_ids[None])
                part.store(self._index(ids), numbers.unflatten(-2, (len(ids), -1)))

    def _chunk(self, page_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the blocks of these pages, the ids of the pages, and those of the blocks."""
        pages, count = self.pages, len(page_ids)
        shape = (pages.num_layers, count, pages.num_heads, self.layout.block_bytes)
        blocks = torch.zeros(shape, dtype=torch.uint8, device=pages.device)
        ids = torch.tensor(page_ids, dtype=torch.int64, device=pages.device)
        return blocks, ids, torch.arange(count, device=pages.device)

    def _index(self, page_ids: Tensor) -> Index:
        pages = self.pages
        return region_index(self.layers, page_ids[None], pages.num_heads, pages.page_size)


class Contents:
    """All that a page of one layer group holds.

    Args:
        parts: in the order in which they lie in a slot.
        page_size: slots of a page.
    """

    def __init__(self, parts: Sequence[SlotPart], page_size: int) -> None:
        self.parts = parts
        self.page_size = page_size
        self.num_bytes = sum(aligned(part.num_bytes) for part in parts)

    def save(self, page_ids: Sequence[int], slots: Sequence[int], host: Tensor) -> None:
        """Pages to slots of host, uint8 [slots, slot_bytes]."""
        for part, rows in self._rows(slots, host):
            part.save(page_ids, rows)

    def load(
        self, page_ids: Sequence[int], slots: Sequence[int], host: Tensor, num_tokens: int
    ) -> None:
        """The reverse, of a request's last pages.

        Args:
            page_ids: in the order of the tokens.
            slots: of each page.
            host: see save.
            num_tokens: of the request, all that it has computed.
        """
        if page_ids:
            for part, rows in self._rows(slots, host):
                part.load(page_ids, rows, (num_tokens - 1) % self.page_size + 1)

    def _rows(
        self, slots: Sequence[int], host: Tensor
    ) -> Iterator[tuple[SlotPart, Sequence[Tensor]]]:
        start = 0
        for part in self.parts:
            end = start + part.num_bytes
            yield part, [host[slot, start:end] for slot in slots]
            start += aligned(part.num_bytes)


def aligned(num_bytes: int) -> int:
    """Rounded up to where a part of a slot may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
