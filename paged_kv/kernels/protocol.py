"""What a backend does: C++ (cpu), Triton (triton) or torch (packed_reference)."""

from __future__ import annotations

from typing import Protocol

import torch

from paged_kv.kernels.index import Index
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor


class Kernels(Protocol):
    """The operations. Their operands were checked in ops, all but the indices in them.

    An index outside is a ValueError before anything is written, except on a GPU, which nobody
    waits for.
    """

    def write(
        self, blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        """Stores new entries, quantized as the layout says.

        Args:
            blocks: uint8 [pages, kv_heads, block_bytes] of one layer.
            layout: of the blocks.
            keys: [tokens, kv_heads, key_size], after RoPE; float32, bfloat16 or float16.
            values: [tokens, kv_heads, value_size].
            slots: int64 [tokens], page id * page_size + offset; negative for tokens to leave out.
                Distinct, or the entries are equal.
        """

    def gather(
        self, stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor
    ) -> Tensor:
        """Keys or values of whole pages.

        Args:
            stack: uint8 [layers, pages, kv_heads, block_bytes].
            layout: of the blocks.
            part: "key" or "value".
            layers: int64 [layers], indices in the stack.
            pages: int64 [rows, pages], page ids.

        Returns:
            float32 [layers, rows, kv_heads, pages * page_size, size].
        """

    def store(
        self, stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor
    ) -> None:
        """Stores numbers in slots: what a merge made of entries.

        Args:
            stack: see gather.
            layout: of the blocks.
            part: "key" or "value".
            index: see index.Index. Distinct places, or equal numbers; offset NOWHERE for numbers
                to leave out.
            numbers: float32 [..., size], of the index's shape.
        """

    def move(
        self, stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index
    ) -> None:
        """Copies the bytes of entries between slots.

        Args:
            stack: see gather.
            layout: of the blocks.
            part: "key" or "value".
            source: which entries; see index.Index.
            target: where to, in the same order. No place is both one entry's source and another's
                target; of equal targets the sources are equal.
        """

    def attend(
        self,
        output: Tensor,
        queries: Queries,
        segments: list[Segment],
        terms: Terms,
        side: Side,
    ) -> None:
        """Attention of new tokens to all that their rows hold, up to themselves.

        Args:
            output: [tokens, heads, value_size], of the queries' dtype; written.
            queries: see Queries.
            segments: one, or two; see Segment. Pages of a row beyond its count are not read.
            terms: see Terms.
            side: see Side; of the first segment's pages. Slots beyond a row's count
                stay as they are.
        """

    def attention_mass(self, attention: DenseAttention, largest: bool = False) -> Tensor:
        """What each entry gets from all queries of its KV head: float32 [..., kv_heads, entries].

        Args:
            attention: see DenseAttention; float32, head_dim a multiple of 16.
            largest: the most that it gets from one of them, not the sum.
        """


class Selection(Protocol):
    """Which entries go, and where survivors move; selection says what it is, by torch.

    Operands are not checked. C++ finds exactly what torch does.
    """

    def lowest(
        self, scores: Tensor, positions: Tensor, keep: Tensor, count: Tensor, limit: int
    ) -> Tensor:
        """See selection.lowest."""

    def pair_moves(
        self, losers: Tensor, freed: Tensor, limit: int, spare: int
    ) -> tuple[Tensor, Tensor]:
        """See selection.pair_moves."""

    def first_places(self, mask: Tensor, limit: int) -> Tensor:
        """See selection.first_places."""
