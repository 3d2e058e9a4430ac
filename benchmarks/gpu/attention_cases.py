"""Attention of one new token per sequence over long rows: our operands, and those of others."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.bench.attention_size import DTYPE, PAGE_SIZE, Size
from paged_kv.kernels import packed_reference
from paged_kv.kernels.operands import Queries, Segment, Side, Terms
from paged_kv.quant import make_layout

Tensor = torch.Tensor
FILL = 1 << 16  # entries written at once


class Ours:
    """An attention over packed pages.

    Args:
        kernels: a protocol.Kernels of the device.
        size: of the rows.
        page_format: of the pages.
        scores: whether scores are added.
        device: of all tensors.
    """

    def __init__(
        self, kernels: Any, size: Size, page_format: str, scores: bool, device: str
    ) -> None:
        self.kernels, self.size = kernels, size
        layout = make_layout(page_format, DTYPE, size.head_dim, size.head_dim, PAGE_SIZE)
        self.layout, num_pages = layout, size.sequences * size.pages
        shape = num_pages, size.kv_heads, layout.block_bytes
        blocks = torch.full(shape, 255, dtype=torch.uint8, device=device)
        for first in range(0, num_pages * PAGE_SIZE, FILL):
            slots = torch.arange(first, min(first + FILL, num_pages * PAGE_SIZE), device=device)
            keys, values = (size.entries_of(len(slots), device) for _ in range(2))
            kernels.write(blocks, layout, keys, values, slots)
        states = size.queries(device=device)
        self.queries = Queries(states, size.starts(device=device))
        self.segment = Segment(blocks, layout, size.table(device), size.counts(device))
        self.output = torch.full_like(states, torch.nan)
        slots_shape = num_pages, size.kv_heads, PAGE_SIZE
        self.side = Side(scores=torch.rand(slots_shape, device=device) if scores else None)
        self.terms = Terms(size.head_dim**-0.5)

    @property
    def num_bytes(self) -> int:
        """That must move: entries, queries, outputs; scores are read and written."""
        size, side = self.size, self.side
        entries = size.sequences * size.entries * size.kv_heads
        per_entry = self.layout.entry_bytes + (0 if side.scores is None else 8)
        return entries * per_entry + 4 * size.sequences * size.heads * size.head_dim

    def run(self) -> None:
        """Writes the output, and adds to the scores."""
        self.kernels.attend(self.output, self.queries, [self.segment], self.terms, self.side)

    def error(self) -> float:
        """The largest relative error, by norm, of outputs and scores of the first and last row."""
        scores = self.side.scores
        before = None if scores is None else scores.clone()
        self.output.fill_(torch.nan)
        self.run()
        worst = 0.0
        for row in {0, self.size.sequences - 1}:
            one = slice(row, row + 1)
            output = torch.full_like(self.output[one], torch.nan)
            states = self.queries.states[one]
            queries = Queries(states, self.queries.starts[:2])
            segment = self.segment._replace(
                table=self.segment.table[one], counts=self.segment.counts[one]
            )
            side = self.side._replace(scores=None if before is None else before.clone())
            packed_reference.attend(output, queries, [segment], self.terms, side)
            worst = max(worst, relative(self.output[one], output))
            if scores is not None:
                pages = segment.table[0].long()
                given, wanted = (of[pages] - before[pages] for of in (scores, side.scores))
                worst = max(worst, relative(given, wanted))
        return worst


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; inf if anything is NaN."""
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return error if error == error else float("inf")


class FlashPaged:
    """FlashAttention 3, as vLLM brings it, over its own bfloat16 pages of the same size."""

    def __init__(self, size: Size, device: str) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        shape = 2, size.sequences * size.pages, PAGE_SIZE, size.kv_heads, size.head_dim
        keys, values = torch.empty(shape, dtype=DTYPE, device=device).normal_()
        states = size.queries(device=device)
        self.output = torch.empty_like(states)
        self.function = flash_attn_varlen_func
        self.operands = {
            "q": states, "k": keys, "v": values, "out": self.output,
            "cu_seqlens_q": size.starts(device=device), "max_seqlen_q": 1,
            "seqused_k": size.counts(device), "max_seqlen_k": size.entries,
            "block_table": size.table(device), "softmax_scale": size.head_dim**-0.5,
            "causal": True, "fa_version": 3,
        }  # fmt: skip

    def run(self) -> None:
        self.function(**self.operands)


class Dense:
    """torch's SDPA over dense bfloat16 keys and values."""

    def __init__(self, size: Size, device: str) -> None:
        shape = 2, size.sequences, size.kv_heads, size.entries, size.head_dim
        self.keys, self.values = torch.empty(shape, dtype=DTYPE, device=device).normal_()
        self.states = size.queries(device=device)[:, :, None]

    def run(self) -> None:
        self.output = torch.nn.functional.scaled_dot_product_attention(
            self.states, self.keys, self.values, enable_gqa=True
        )
