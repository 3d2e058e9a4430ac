"""One layer in one step: its new queries against all that its rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch

from paged_kv.hf.arena import NativeArena, as_stack
from paged_kv.hf.modes import keeps
from paged_kv.hf.paged_attention import (
    QUERY_BLOCK,
    Bias,
    block_size,
    fused,
    masked,
    mix,
    probabilities,
)
from paged_kv.hf.providers import Held
from paged_kv.hf.rows import Rows
from paged_kv.kernels.operands import Terms
from paged_kv.store.entries import whole_pages

Tensor = torch.Tensor


def refusing_gradients(output: Tensor) -> Tensor:
    """The same; a backward pass through it is a ValueError: pages remember no graph.

    Gradients of queries alone would be wrong ones, and nobody would notice.
    """
    if output.requires_grad:
        output.register_hook(_refuse)
    return output


def _refuse(_: Tensor) -> NoReturn:
    raise ValueError(
        "keys and values that are read from pages have no gradients (only a first forward pass has "
        "them, if no policy reads scores and the model has no softcap, sinks or masks but causal "
        "ones): train with use_cache=False"
    )


class LayerStep:
    """Attention of one layer in the step that has begun; its new entries are stored.

    Args:
        rows: of the cache.
        index: of the layer, among those that the cache holds.
        terms: how the layer computes attention.
        bias: see Bias; None: queries see all that came before, as it is.
    """

    def __init__(self, rows: Rows, index: int, terms: Terms, bias: Bias | None = None) -> None:
        self.rows, self.index, self.terms, self.bias = rows, index, terms, bias
        self.arena, self.policy = rows.tables.arena(index), rows.policy
        self.device = self.arena.geometry.device

    def attend(self, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, q, size]: attention of q new queries in each of some rows.

        Args:
            row: the first of the rows.
            query: [rows, heads, q, head_dim].
            key: the new keys, [rows, kv_heads, q, head_dim].
            value: the new values, [rows, kv_heads, q, size].
        """
        return self._attend(row, query, key, value)

    def attend_ragged(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[Tensor]:
        """The same of all rows, each with tokens of its own, or none: [heads, tokens, size]."""
        if all(query.shape[1] == 1 for query in queries):
            stacked = (torch.stack(list(part)) for part in (queries, keys, values))
            return list(self.attend(0, *stacked))
        outputs = []
        for row, new in enumerate(zip(queries, keys, values, strict=True)):
            query, _, value = new
            if query.shape[1]:
                outputs.append(self.attend(row, *(part[None] for part in new))[0])
            else:
                outputs.append(query.new_empty(len(query), 0, value.shape[-1]))
        return outputs

    def _attend(self, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rows, num_queries = len(query), query.shape[2]
        first = self.rows.size[self.index, row : row + num_rows].tolist()
        explicit = self._is_explicit
        alike = min(first) == max(first)
        fresh = max(first) == 0 and num_queries > 1 and self.bias is None
        if fresh and not explicit:  # what is stored is at hand
            return fused(query, key, value, first, self.terms.scale)
        if num_queries == 1 and not explicit and self.bias is None:
            output = self._provided(row, query)
            if output is not None:
                return refusing_gradients(output)
        apart = self.bias is not None or (explicit and not alike)
        if num_rows > 1 and (apart or not self._together(row, num_rows, alike)):
            parts = (self._attend(row + i, *(t[i : i + 1] for t in (query, key, value)))
                     for i in range(num_rows))  # fmt: skip
            return torch.cat(list(parts))
        return refusing_gradients(self._over_pages(row, query, first))

    def _over_pages(self, row: int, query: Tensor, first: list[int]) -> Tensor:
        """[rows, heads, q, size], of some rows at once, that held so many entries before."""
        num_rows, num_queries = len(query), query.shape[2]
        size = max(first) + num_queries
        keys, values = (self._numbers(part, row, num_rows, size) for part in ("keys", "values"))
        if keys.dtype != query.dtype or values.dtype != query.dtype:
            keys, values = keys.to(query.dtype), values.to(query.dtype)
        bias = None
        if self.bias is not None:
            bias = self._bias(row, first[0], query.shape[1], num_queries)
        if self._is_explicit:
            return self._explicit(row, query, keys, values, first, bias)
        if bias is not None:
            return masked(query, keys, values, bias[None].to(query.dtype), self.terms.scale)
        return fused(query, keys, values, first, self.terms.scale)

    @property
    def _is_explicit(self) -> bool:
        """Whether SDPA is not enough."""
        return self.rows.reads_scores or not self.terms.is_plain

    def _numbers(self, part: str, row: int, num_rows: int, size: int) -> Tensor:
        """[rows, kv_heads, size, ...]: the first keys, or values, of rows."""
        return self._read(self.arena.content[part], row, num_rows, size)

    def _provided(self, row: int, query: Tensor) -> Tensor | None:
        """Plain attention of one new token each, if somebody else than SDPA computes it."""
        provider, rows = self.rows.provider, slice(row, row + len(query))
        if provider is None or not isinstance(self.arena, NativeArena):
            return None
        pages = self.rows.tables.ids[self.index, rows]
        entries = Held(self.arena, pages, self.rows.size[self.index, rows] + 1)
        if not provider.takes(query, entries):
            return None
        return provider.attend(query, entries, self.terms.scale)

    def _together(self, row: int, num_rows: int, alike: bool) -> bool:
        """Whether one call for all rows is worth it: on a CPU, copies and masks are not."""
        if self.device.type != "cpu":
            return True
        in_place = num_rows == self.rows.num_rows and self.rows.tables.spacing[self.index]
        runs = (self.rows.tables.first[self.index, row : row + num_rows] >= 0).all()
        return alike and bool(in_place or not runs)

    def _read(self, tensor: Tensor, row: int, num_rows: int, size: int) -> Tensor:
        """[rows, kv_heads, size, ...]: the first entries of rows; a view where they lie evenly."""
        tables, page_size = self.rows.tables, self.arena.page_size
        first = tables.first[self.index, row : row + num_rows]
        flat = tensor.flatten(1, 2)
        start = int(first[0]) * page_size
        if num_rows == 1 and start >= 0:
            return flat[:, start : start + size][None]
        spacing = tables.spacing[self.index] * page_size if num_rows == len(tables.ids[0]) else 0
        if spacing and start + (num_rows - 1) * spacing + size <= flat.shape[1]:
            shape = (num_rows, flat.shape[0], size, *flat.shape[2:])
            strides = (spacing * flat.stride(1), *flat.stride())
            return flat.as_strided(shape, strides, start * flat.stride(1))
        num_pages = -(-size // page_size)
        ids = tables.ids[self.index, row : row + num_rows, :num_pages]
        pages = torch.from_numpy(np.maximum(ids, 0)).to(tensor.device)
        layer = torch.zeros(1, dtype=torch.int64, device=tensor.device)
        return whole_pages(as_stack(tensor), layer, pages)[0][:, :, :size]

    def _bias(self, row: int, first: int, num_heads: int, num_queries: int) -> Tensor:
        """float32 [heads or 1, queries, entries] of one row."""
        assert self.bias is not None
        device, size = self.device, first + num_queries
        num_tokens = int(self.rows.num_tokens[row])
        queries = torch.arange(num_tokens, num_tokens + num_queries, device=device)
        if self.policy is None:  # entries are where they were written
            entries = torch.arange(size, device=device)[None]
        else:
            entries = self._read(self.arena.side["positions"], row, 1, size)[0].long()
        bias = self.bias(row, queries, entries)
        if len(bias) not in (1, num_heads):  # one for each KV head
            bias = bias.repeat_interleave(num_heads // len(bias), 0)
        return bias

    def _explicit(
        self,
        row: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        first: list[int],
        bias: Tensor | None,
    ) -> Tensor:
        """Attention by its probabilities, in float32; a policy may want to add them up."""
        outputs = []
        numbers = values.float()
        rows = slice(row, row + len(query))
        # Without a policy that adds up, logits are those of transformers to the bit.
        size = block_size(query.device) if self.rows.reads_scores else QUERY_BLOCK
        with torch.autocast(query.device.type, enabled=False):
            for start, chances in probabilities(query, keys, first, self.terms, bias, size):
                outputs.append(mix(chances, numbers))
                if self.rows.reads_scores:
                    tokens = self.rows.num_tokens[rows, None] + start
                    self._accumulate(row, chances, tokens + np.arange(chances.shape[3]))
        return torch.cat(outputs, 2).to(query.dtype)

    @keeps
    def _accumulate(self, row: int, chances: Tensor, tokens: np.ndarray) -> None:
        """Adds probabilities [rows, kv_heads, group, queries, n] of queries of these tokens."""
        assert self.policy is not None
        num_rows, size = len(chances), chances.shape[-1]
        stored = self.arena.side["scores"]
        scores = self._read(stored, row, num_rows, size)
        positions = torch.from_numpy(tokens).to(scores.device)
        new = self.policy.accumulate(scores, chances, positions)
        page_size = self.arena.page_size
        slot = np.arange(size)
        ids = self.rows.tables.ids[self.index, row : row + num_rows]
        places = ids[:, slot // page_size] * page_size + slot % page_size
        index = torch.from_numpy(places.ravel()).to(scores.device)
        stored.flatten(1).index_copy_(1, index, new.transpose(0, 1).flatten(1))
