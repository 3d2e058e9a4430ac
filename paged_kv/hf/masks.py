"""Masks of transformers, kept as what they are made of until a layer knows its entries.

transformers makes one mask for all layers before the first of them; what a layer of ours holds
differs by row and KV head. So our mask function only notes its arguments.

Tokens of a row are counted without padding ("token"), those of a batch with it ("stream").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import causal_mask_function

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.opaque import Opaque
from paged_kv.hf.paged_attention import Bias

Tensor = torch.Tensor


class PagedLength(int):
    """Keys that a mask covers, as a PagedLayer says it: transformers hands it to mask functions."""


@dataclass
class MaskSpec(Opaque):
    """A mask that has not been made.

    Args:
        make: transformers' mask function.
        arguments: of it.
    """

    make: Callable[..., Any]
    arguments: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def padding(self) -> Tensor | None:
        """bool [rows, stream]: False for padding; None if there is none."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask

    def dense(self) -> Tensor | None:
        """What transformers would have made, for a layer that is not paged."""
        if "dense" not in self.made:
            self.made["dense"] = self.make(**self.arguments)
        mask: Tensor | None = self.made["dense"]
        return mask

    @property
    def is_causal(self) -> bool:
        """Whether queries see everything before them that is not padding."""
        return self.arguments.get("mask_function") is causal_mask_function

    @property
    def query_offset(self) -> int:
        """Stream index of the first query."""
        return int(self.arguments["q_offset"])

    @property
    def real(self) -> np.ndarray[Any, Any] | None:
        """bool [rows, queries]: which of the new tokens are not padding; None: all are."""
        return None if self._counted is None else self._counted[1]

    @property
    def num_held(self) -> Int64s | None:
        """int64 [rows]: tokens so far that are not padding; None: there is no padding."""
        return None if self._counted is None else self._counted[0]

    @cached_property
    def _counted(self) -> tuple[Int64s, np.ndarray[Any, Any] | None] | None:
        """(num_held, real), read from the device at once, and only once in a forward pass.

        Raises:
            ValueError: the mask does not cover the tokens so far and the new ones.
        """
        if self.padding is None:
            return None
        start, count = self.query_offset, int(self.arguments["q_length"])
        if self.padding.shape[1] < start + count:
            raise ValueError(
                f"attention_mask has {self.padding.shape[1]} columns, but the cache has processed "
                f"{start} tokens and {count} are new: it must cover all of them"
            )
        held = self.padding[:, :start].sum(1, keepdim=True)
        columns = torch.cat([held, self.padding[:, start : start + count]], 1).cpu().numpy()
        new = columns[:, 1:].astype(bool)
        return columns[:, 0].astype(np.int64), None if new.all() else new

    def streams(self, row: int) -> Tensor | None:
        """int64: stream index of each token of a row; None if they are the same."""
        if self.padding is None:
            return None
        return self.padding[row].nonzero()[:, 0]


@torch.compiler.disable
def note(make: Callable[..., Any], arguments: dict[str, Any]) -> MaskSpec:
    """The mask that transformers' function would make of these arguments."""
    return MaskSpec(make, arguments)


def counts_of(mask: MaskSpec | Tensor | None, held: Int64s, num_queries: int) -> Int64s:
    """int64 [rows]: new tokens that are not padding.

    Args:
        mask: what a layer was given.
        held: int64 [rows], tokens of each row so far.
        num_queries: new tokens, padding included.

    Raises:
        ValueError: the mask is of other rows, or not that of the tokens so far.
    """
    num_rows, real = len(held), None
    if isinstance(mask, MaskSpec) and mask.num_held is not None:
        real = mask.real
        if len(mask.num_held) != num_rows:
            raise ValueError(
                f"attention_mask has {len(mask.num_held)} rows, but the batch has {num_rows}: it "
                "needs one for each"
            )
        if (wrong := np.flatnonzero(mask.num_held != held)).size:
            row = int(wrong[0])
            raise ValueError(
                f"attention_mask shows {mask.num_held[row]} of the tokens so far in row {row}, but "
                f"the cache has taken in {held[row]} there: it must be 0 for what was padding when "
                "it was processed, and 1 for all else; a PagedCache cannot hide tokens afterwards"
            )
    if real is None:
        return np.full(num_rows, num_queries, dtype=np.int64)
    return np.asarray(real.sum(1), dtype=np.int64)


def bias_of(
    mask: MaskSpec | Tensor | None, position_bias: Tensor | None, heads: tuple[int, int]
) -> Bias | None:
    """What a layer adds to its logits, or None if only causality matters.

    Args:
        mask: what the layer was given.
        position_bias: float [1 or rows, heads, queries, stream] (T5), or None.
        heads: number of query heads and of KV heads.
    """
    custom = mask if isinstance(mask, Tensor) else None
    rule = None
    if isinstance(mask, MaskSpec) and not mask.is_causal:
        rule = mask.arguments["mask_function"]
    if custom is None and rule is None and position_bias is None:
        return None

    def bias(row: int, queries: Tensor, entries: Tensor) -> Tensor:
        known = mask.streams(row) if isinstance(mask, MaskSpec) else None
        if known is not None:
            queries, entries = known[queries], known[entries]
        first = _first_query(mask, queries)
        total = torch.where(_visible(rule, row, queries, entries), 0.0, -torch.inf)
        if custom is not None:
            total = torch.zeros_like(total)  # it says all there is to say
        for extra in (custom, position_bias):
            if extra is not None:
                more = _at(extra, row, queries - first, entries, heads)
                if len(total) != len(more) and min(len(total), len(more)) > 1:  # of KV heads
                    total, more = (
                        part.repeat_interleave(heads[0] // len(part), 0) for part in (total, more)
                    )
                total = total + more
        return total

    return bias


def _first_query(mask: MaskSpec | Tensor | None, streams: Tensor) -> int:
    """Stream index of the step's first query, padding included."""
    return mask.query_offset if isinstance(mask, MaskSpec) else int(streams[0])


def _visible(rule: Callable[..., Any] | None, row: int, queries: Tensor, entries: Tensor) -> Tensor:
    """bool [kv_heads or 1, queries, entries]."""
    if rule is None:
        return entries[:, None] <= queries[:, None]
    rows = torch.full((1, 1, 1), row, device=entries.device)
    heads = torch.arange(len(entries), device=entries.device)[:, None, None]
    return rule(rows, heads, queries[None, :, None], entries[:, None]).expand(
        len(entries), len(queries), entries.shape[1]
    )


def _at(mask: Tensor, row: int, queries: Tensor, entries: Tensor, heads: tuple[int, int]) -> Tensor:
    """float32 [heads or kv_heads or 1, queries, entries] of a mask [rows, heads, queries, stream].

    Args:
        mask: bool (True: look) or float, to be added.
        row: which row.
        queries: int64 [queries], their places in the mask.
        entries: int64 [kv_heads or 1, entries], stream index of each entry.
        heads: number of query heads and of KV heads.
    """
    row_mask = mask[row if len(mask) > 1 else 0]
    # A position bias of the decoder's last step can have the columns of this step only.
    row_mask = row_mask[:, queries if row_mask.shape[1] > 1 else queries * 0]
    if len(row_mask) > 1 and len(entries) > 1:
        entries = entries.repeat_interleave(heads[0] // heads[1], 0)
    size = max(len(row_mask), len(entries))
    index = entries[:, None].expand(size, row_mask.shape[1], -1)
    values = row_mask.expand(size, -1, -1).gather(-1, index)
    if values.dtype == torch.bool:
        return torch.where(values, 0.0, -torch.inf)
    return values.float()
