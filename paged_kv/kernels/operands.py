"""What the kernels over packed pages are given, beside numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor


class Queries(NamedTuple):
    """New tokens of some rows (sequences).

    Args:
        states: [tokens, heads, head_dim], after RoPE; float32, bfloat16 or float16; the last
            dimension contiguous. Heads that share a KV head are neighbours.
        starts: int32 [rows + 1]: tokens [starts[r], starts[r + 1]) are row r's. They are its
            newest entries: already stored, and each sees those before it and itself.
    """

    states: Tensor
    starts: Tensor


class Segment(NamedTuple):
    """Entries that rows hold in pages of one layout.

    What a row holds is its first segment's entries, then its second's. A second segment holds the
    newest ones in the model's own dtype (the residual), while the first one's pages hold the rest.

    Args:
        blocks: uint8 [pages, kv_heads, block_bytes], the last dimension contiguous.
        layout: of the blocks.
        table: int32 [rows, pages]: page ids of each row, the last dimension contiguous. The first
            segment's table has the pages of all entries, the second's too: side data lies there.
        counts: int32 [rows], entries of each row in this segment.
    """

    blocks: Tensor
    layout: PageLayout
    table: Tensor
    counts: Tensor


class Terms(NamedTuple):
    """How attention is computed.

    Args:
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        sinks: float32 [heads], logits that take part in the softmax and get nothing.
        weights: float32 [pages, kv_heads, page_size], by slot, positive; their logarithm is added
            to the logits: an entry that stands for several.
        scores: float32 [pages, kv_heads, page_size], by slot: what each entry gets, summed over
            its query heads and the new tokens, is added.
    """

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
