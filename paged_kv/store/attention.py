"""Attention over packed pages, and over the residual's if there is one."""

from __future__ import annotations

import torch

from paged_kv.kernels import ops
from paged_kv.kernels.operands import NO_SIDE, Queries, Segment, Side, Terms

Tensor = torch.Tensor


def attend(
    output: Tensor,
    queries: Queries,
    pages: Segment,
    residual: Segment | None,
    terms: Terms,
    side: Side = NO_SIDE,
) -> None:
    """Attention of new tokens to all that their rows hold.

    Args:
        output: [tokens, heads, value_size], of the queries' dtype; written.
        queries: see Queries.
        pages: all entries of each row, as they are stored.
        residual: the newest of them, in the model's dtype: these are read instead. None for none.
        terms: see Terms.
        side: see Side.
    """
    segments = [pages]
    if residual is not None:
        segments = [pages._replace(counts=pages.counts - residual.counts), residual]
    ops.attend(output, queries, segments, terms, side)
