"""The residual: the newest pages of each row in the model's dtype, beside the quantized ones.

Every entry is written to its quantized page, too. So nothing is quantized when it gets old, and
whoever moves, shares or drops pages need not know of this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.kernels import ops
from paged_kv.kernels.operands import Segment
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant.native import Native

Tensor = torch.Tensor


class Residual:
    """Rings of pages; token t of row r lies in page r * num_pages + t // p % num_pages.

    Args:
        num_layers: layers.
        num_pages: newest pages of a row that are kept; may be 0.
        page_size: p, tokens per page.
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int) -> None:
        self.num_layers, self.num_pages, self.page_size = num_layers, num_pages, page_size
        self.first = np.zeros(0, dtype=np.int64)  # first token that is here, by row: a page's first
        self.blocks: Tensor | None = None  # uint8 [layers, rows * num_pages, kv_heads, bytes]

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return 0 if self.blocks is None else self.blocks.numel()

    def bind(self, geometry: Geometry) -> None:
        """The first keys have come."""
        key = Native(geometry.key_size, geometry.key_dtype)
        value = Native(geometry.value_size, geometry.value_dtype)
        self.layout = PageLayout(key, value, self.page_size)
        num_blocks = len(self.first) * self.num_pages
        shape = (self.num_layers, num_blocks, geometry.num_heads, self.layout.block_bytes)
        self.blocks = torch.zeros(shape, dtype=torch.uint8, device=geometry.device)

    def add_rows(self, num_rows: int) -> None:
        """Rows without a token, at the end."""
        self.first = np.pad(self.first, (0, num_rows))
        if self.blocks is not None:
            size = (self.num_layers, num_rows * self.num_pages, *self.blocks.shape[2:])
            self.blocks = torch.cat([self.blocks, self.blocks.new_zeros(size)], 1)

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        self.first = self.first[indices]
        if self.blocks is not None and not np.array_equal(indices, np.arange(len(self.first))):
            rows = self.blocks.unflatten(1, (-1, self.num_pages))
            index = torch.from_numpy(indices).to(rows.device)
            self.blocks = rows.index_select(1, index).flatten(1, 2)

    def copy(self) -> Residual:
        """One that shares nothing with this."""
        other = copy.copy(self)
        other.first = self.first.copy()
        other.blocks = None if self.blocks is None else self.blocks.clone()
        return other

    def state(self) -> dict[str, Tensor]:
        """What restore takes."""
        state = {"first": torch.from_numpy(self.first.copy())}
        return state if self.blocks is None else {**state, "blocks": self.blocks}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Holds these tokens from now on. It has been bound."""
        self.first = state["first"].numpy().copy()
        if "blocks" in state:
            self.blocks = state["blocks"].clone().to(device)

    def counts(self, num_tokens: Int64s) -> Int64s:
        """int64 [rows]: how many of a row's entries, the newest, are here."""
        return np.maximum(num_tokens - self.first, 0) * (self.num_pages > 0)

    def has_lost(self, num_tokens: Int64s) -> bool:
        """Whether pages that rows of num_tokens [rows] had here have been overwritten."""
        first = (-(-num_tokens // self.page_size) - self.num_pages) * self.page_size
        return self.num_pages > 0 and bool((self.first > np.maximum(first, 0)).any())

    def crop(self, num_tokens: Int64s) -> None:
        """Rows end at num_tokens [rows] again. What the ring has lost since then stays lost."""
        page = -(-num_tokens // self.page_size) * self.page_size
        self.first = np.where(num_tokens < self.first, page, self.first)

    def note(self, num_tokens: Int64s, counts: Int64s) -> None:
        """counts [rows] tokens come to those before, num_tokens [rows]; write follows."""
        size, ends = self.page_size, num_tokens + counts
        self.first = np.maximum(self.first, (-(-ends // size) - self.num_pages) * size)
        assert self.blocks is not None
        row = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        token = num_tokens[row] + nth
        slots = self._page(row, token // size) * size + token % size
        slots = np.where(token >= self.first[row], slots, -1)
        device = self.blocks.device
        self._slots = torch.from_numpy(slots).to(device)
        rows, pages = np.arange(len(counts))[:, None], np.arange(self.num_pages)
        table = self._page(rows, self.first[:, None] // size + pages).astype(np.int32)
        self._table = torch.from_numpy(np.ascontiguousarray(table)).to(device)
        self._counts = torch.from_numpy(self.counts(ends).astype(np.int32)).to(device)

    def _page(self, row: Int64s, index: Int64s) -> Int64s:
        """Where the index-th page of a row's tokens lies."""
        return np.asarray(row * self.num_pages + index % self.num_pages, dtype=np.int64)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores the new tokens of a layer, of all rows: [kv_heads, tokens, size]."""
        new = keys.transpose(0, 1), values.to(keys.dtype).transpose(0, 1)
        ops.write(self._blocks(layer), self.layout, *new, self._slots)

    def segment(self, layer: int) -> Segment:
        """What is here of a layer, the new tokens included."""
        return Segment(self._blocks(layer), self.layout, self._table, self._counts)

    def entries(self, layer: int, row: int, part: str) -> Tensor:
        """float32 [kv_heads, n, size]: the same of one row; part is "key" or "value"."""
        index = torch.zeros(1, dtype=torch.int64, device=self._table.device)
        pages = self._table[row : row + 1].long()
        found = ops.gather(self._blocks(layer)[None], self.layout, part, index, pages)[0, 0]
        return found[:, : int(self._counts[row])]

    def _blocks(self, layer: int) -> Tensor:
        assert self.blocks is not None
        return self.blocks[layer]
