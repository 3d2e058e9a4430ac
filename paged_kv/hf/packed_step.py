"""One layer in one step, over packed pages: what is stored is what all queries see.

That includes the step's own tokens: a prompt sees what later steps will see, and what vLLM sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from paged_kv.hf.arena import PackedArena
from paged_kv.hf.layer_step import LayerStep
from paged_kv.kernels.operands import NO_SIDE, Queries, Segment, Side, Terms
from paged_kv.store.attention import attend

Tensor = torch.Tensor


class PackedStep(LayerStep):
    """See LayerStep. What the kernels cannot compute (masks) is computed from decoded entries."""

    arena: PackedArena

    def attend(self, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, q, size]: by the kernels, if they can; see LayerStep."""
        if not self._has_kernel:
            return super().attend(row, query, key, value)
        output = self._by_kernel(query.transpose(1, 2).flatten(0, 1), value.shape[-1])
        return output.unflatten(0, (len(query), -1)).transpose(1, 2)

    def attend_ragged(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[Tensor]:
        """The same of all rows, each with tokens of its own, or none."""
        if not self._has_kernel:
            return super().attend_ragged(queries, keys, values)
        output = self._by_kernel(torch.cat(list(queries), 1).transpose(0, 1), values[0].shape[-1])
        return list(output.transpose(0, 1).split([query.shape[1] for query in queries], 1))

    @property
    def _has_kernel(self) -> bool:
        """Whether the kernels know all that the layer adds to its logits, and the policy reads."""
        if self.bias is not None:
            return False
        if not self.rows.reads_scores:
            return True
        return self.policy is not None and self.policy.kernel_decay is not None

    def _by_kernel(self, states: Tensor, value_size: int) -> Tensor:
        """[tokens, heads, size], of queries [tokens, heads, head_dim] of all rows."""
        rows, arena, index = self.rows, self.arena, self.index
        step = rows.step
        assert step is not None
        pages = Segment(arena.blocks, arena.layout, step.page_ids[index], step.sizes[index])
        newest = None
        if step.newest is not None:
            newest = rows.residual.segment(index, step.newest)
        side = NO_SIDE
        if rows.reads_scores:
            assert self.policy is not None
            assert self.policy.kernel_decay is not None
            scores = arena.side["scores"].transpose(0, 1)
            side = Side(scores=scores, decay=self.policy.kernel_decay)
        sinks = None if self.terms.sinks is None else self.terms.sinks.detach().float()
        terms = Terms(self.terms.scale, self.terms.softcap, sinks)
        output = states.new_empty(*states.shape[:2], value_size)
        with torch.no_grad():
            queries = Queries(states.detach(), step.starts)
            attend(output, queries, pages, newest, terms, side)
        return _NoGradient.apply(states, output) if states.requires_grad else output

    def _numbers(self, part: str, row: int, num_rows: int, size: int) -> Tensor:
        """See LayerStep; float32, the residual's as they were."""
        rows, num_pages = self.rows, -(-size // self.arena.page_size)
        ids = rows.tables.ids[self.index, row : row + num_rows, :num_pages]
        pages = torch.from_numpy(ids.clip(0)).to(self.device)
        layer = torch.zeros(1, dtype=torch.int64, device=self.device)
        entries: Tensor = getattr(self.arena.pages, part).gather(layer, pages)[0][:, :, :size]
        step = rows.step
        if step is None or step.newest is None:
            return entries
        residual = rows.residual.entries(self.index, part[:-1], step.newest)
        ends = step.sizes[self.index, row : row + num_rows].tolist()
        counts = step.newest.counts[row : row + num_rows].tolist()
        for at, (end, count) in enumerate(zip(ends, counts, strict=True)):
            entries[at, :, end - count : end] = residual[row + at, :, :count]
        return entries


class _NoGradient(torch.autograd.Function):
    """The kernels have no backward pass; what asks for one must not get a wrong one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, output: Tensor) -> Tensor:
        """output, as if it came from states."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        """Refuses."""
        raise ValueError("quantized pages have no gradients: use page_format native for training")
