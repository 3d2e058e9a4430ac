"""What the kernels are given, beside numbers."""

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
    """How a layer computes attention, whatever it attends to.

    Args:
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        sinks: float32 [heads], logits that take part in the softmax and get nothing; None for none.
    """

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether SDPA can compute it."""
        return not self.softcap and self.sinks is None


class Side(NamedTuple):
    """What lies beside the pages, a number for each slot; None where nobody wants it.

    Args:
        weights: float32 [pages, kv_heads, page_size], by slot, positive; their logarithm is added
            to the logits: an entry that stands for several.
        scores: float32 [pages, kv_heads, page_size], by slot; those of an entry just written are 0.
            Each new token multiplies its row's with decay and adds what they get from it, summed
            over the query heads.
        decay: in (0, 1]. Below 1 no two rows may have a page in common: each would fade it.
    """

    weights: Tensor | None = None
    scores: Tensor | None = None
    decay: float = 1.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {"weights": self.weights, "scores": self.scores}
        return {name: numbers for name, numbers in named.items() if numbers is not None}


NO_SIDE = Side()


class Expected(NamedTuple):
    """The expected logarithm of attention, a function of a key before RoPE.

    By layer, KV head, and query head of its group:

        log attention(k) = linear . k + quadratic . k^2 - normaliser

    Args:
        linear: float32 [layers, kv_heads, group, head_dim].
        quadratic: float32 [layers, kv_heads, group, head_dim].
        normaliser: float32 [layers, kv_heads, group].
    """

    linear: Tensor
    quadratic: Tensor
    normaliser: Tensor


class DenseAttention(NamedTuple):
    """Attention of some queries to keys that lie in a tensor, not in pages.

    Args:
        queries: float32 [..., kv_heads, group, queries, head_dim], after RoPE.
        keys: float32, broadcasts to [..., kv_heads, entries, head_dim].
        query_positions: int64, broadcasts to [..., kv_heads, group, queries]; -1 for no query.
        key_positions: int64, broadcasts to [..., kv_heads, entries]; a query does not see larger
            ones than its own.
        terms: see Terms; but the sinks broadcast to [..., kv_heads, group].
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    terms: Terms

    def expanded(self) -> DenseAttention:
        """With the queries' leading dimensions everywhere; views."""
        queries, keys, query_positions, key_positions, terms = self
        lead, (group, num_queries) = queries.shape[:-3], queries.shape[-3:-1]
        num_entries, size = keys.shape[-2:]
        if terms.sinks is not None:
            terms = terms._replace(sinks=terms.sinks.float().expand(*lead, group))
        return DenseAttention(
            queries,
            keys.expand(*lead, num_entries, size),
            query_positions.expand(*lead, group, num_queries),
            key_positions.expand(*lead, num_entries),
            terms,
        )
