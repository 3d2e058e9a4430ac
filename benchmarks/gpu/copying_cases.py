"""Calls that write, move and observe entries, with what must be right of each."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import relative

from paged_kv.bench.attention_size import DTYPE, PAGE_SIZE
from paged_kv.kernels import packed_reference, reference
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.quant import make_layout

Tensor = torch.Tensor
INDEX_BYTES = 64  # of an entry that moves, key and value: places of source and target
WINDOW = 32  # queries that are observed


class Writing:
    """New tokens of all KV heads are stored, in slots anywhere.

    Args:
        kernels: a protocol.Kernels of the device.
        page_format: of the pages.
        shape: (tokens, KV heads, head size).
        device: of all tensors.
    """

    def __init__(self, kernels: Any, page_format: str, shape: tuple[int, int, int], device: str):
        tokens, kv_heads, head_dim = shape
        self.kernels = kernels
        self.layout = make_layout(page_format, DTYPE, head_dim, head_dim, PAGE_SIZE)
        pages = 2 * -(-tokens // PAGE_SIZE)
        block = pages, kv_heads, self.layout.block_bytes
        self.blocks = torch.full(block, 255, dtype=torch.uint8, device=device)
        self.new = torch.randn(2, *shape, device=device).to(DTYPE)
        self.slots = torch.randperm(pages * PAGE_SIZE, device=device)[:tokens]
        self.num_bytes = tokens * (kv_heads * (4 * head_dim + self.layout.entry_bytes) + 8)

    def run(self) -> None:
        self.kernels.write(self.blocks, self.layout, *self.new, self.slots)

    def error(self) -> float:
        """0 if all bytes are the reference's, else inf."""
        wanted = torch.full_like(self.blocks, 255)
        packed_reference.write(wanted, self.layout, *self.new, self.slots)
        self.run()
        return 0.0 if torch.equal(self.blocks, wanted) else float("inf")


class Moving:
    """Half of the pages' entries move into the other half, each into a slot of its own.

    Args:
        kernels: a protocol.Kernels of the device.
        page_format: of the pages.
        shape: (layers, pages, KV heads, head size).
        device: of all tensors.
    """

    def __init__(
        self, kernels: Any, page_format: str, shape: tuple[int, int, int, int], device: str
    ) -> None:
        layers, pages, kv_heads, head_dim = shape
        self.kernels = kernels
        self.layout = make_layout(page_format, DTYPE, head_dim, head_dim, PAGE_SIZE)
        block = layers, pages, kv_heads, self.layout.block_bytes
        self.stack = torch.randint(0, 256, block, dtype=torch.uint8, device=device)
        order = torch.randperm(pages, device=device)[: pages // 2 * 2].view(2, -1, 1, 1)
        layer = torch.arange(layers, device=device)[:, None, None, None]
        head = torch.arange(kv_heads, device=device)[:, None]
        slot = torch.arange(PAGE_SIZE, device=device)
        self.source = layer, order[0], head, slot
        self.target = layer, order[1], head, torch.randperm(PAGE_SIZE, device=device)
        self.num_entries = layers * order.shape[1] * kv_heads * PAGE_SIZE
        self.num_bytes = self.num_entries * (2 * self.layout.entry_bytes + INDEX_BYTES)

    def run(self) -> None:
        self._move(self.kernels, self.stack)

    def _move(self, kernels: Any, stack: Tensor) -> None:
        for part in ("key", "value"):
            kernels.move(stack, self.layout, part, self.source, self.target)

    def error(self) -> float:
        """0 if all bytes are the reference's, else inf."""
        wanted = self.stack.clone()
        self._move(packed_reference, wanted)
        self.run()
        return 0.0 if torch.equal(self.stack, wanted) else float("inf")


class Observing:
    """What the last queries of sequences give to dense float32 keys.

    Args:
        kernels: a protocol.Kernels of the device.
        shape: (sequences, entries, query heads, KV heads, head size).
        device: of all tensors.
    """

    def __init__(self, kernels: Any, shape: tuple[int, int, int, int, int], device: str) -> None:
        sequences, entries, heads, kv_heads, head_dim = shape
        self.kernels, group = kernels, heads // kv_heads
        queries = torch.randn(sequences, kv_heads, group, WINDOW, head_dim, device=device)
        keys = torch.randn(sequences, kv_heads, entries, head_dim, device=device)
        asked = torch.arange(entries - WINDOW, entries, device=device)
        held = torch.arange(entries, device=device)
        self.attention = DenseAttention(queries, keys, asked, held, Terms(head_dim**-0.5))
        self.num_bytes = 2 * keys.nbytes + queries.nbytes + 20 * keys[..., 0].numel()

    def run(self) -> Tensor:
        found: Tensor = self.kernels.attention_mass(self.attention)
        return found

    def error(self) -> float:
        """Relative, by norm, of the first sequence."""
        queries, keys, *rest = self.attention
        first = DenseAttention(queries[:1], keys[:1], *rest)
        return relative(self.run()[:1], reference.attention_mass(first))
