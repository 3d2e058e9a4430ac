"""One layer in one step, over packed pages: what is stored is what all queries see.

That includes the step's own tokens: a prompt sees what later steps will see, and what vLLM sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from paged_kv.hf.arena import PackedArena
from paged_kv.hf.layer_step import LayerStep
from paged_kv.kernels import ops
from paged_kv.kernels.operands import Queries, Segment, Terms

Tensor = torch.Tensor


class PackedStep(LayerStep):
    """See LayerStep. What the kernels cannot compute (masks) is computed from decoded entries."""

    arena: PackedArena

    def attend(self, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See LayerStep."""
        if not self._has_kernel:
            return super().attend(row, query, key, value)
        self._observe(row, query)
        output = self._by_kernel(query.transpose(1, 2).flatten(0, 1), value.shape[-1])
        return output.unflatten(0, (len(query), -1)).transpose(1, 2)

    def attend_ragged(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[Tensor]:
        """See LayerStep."""
        if not self._has_kernel:
            return super().attend_ragged(queries, keys, values)
        for row, query in enumerate(queries):
            if query.shape[1]:
                self._observe(row, query[None])
        output = self._by_kernel(torch.cat(list(queries), 1).transpose(0, 1), values[0].shape[-1])
        return list(output.transpose(0, 1).split([query.shape[1] for query in queries], 1))

    @property
    def _has_kernel(self) -> bool:
        """Whether the terms are those that the kernels know."""
        if self.terms.bias is not None:
            return False
        policy = self.policy
        return not self.sequences.reads_scores or (policy is not None and policy.sums_attention)

    def _by_kernel(self, states: Tensor, value_size: int) -> Tensor:
        """[tokens, heads, size], of queries [tokens, heads, head_dim] of all rows."""
        sequences, arena, index = self.sequences, self.arena, self.index
        step = sequences.step
        assert step is not None
        table, sizes = step.page_ids[index], step.sizes[index]
        segments = [Segment(arena.blocks, arena.layout, table, sizes)]
        if sequences.residual_pages:
            newest = sequences.residual.segment(index)
            segments = [segments[0]._replace(counts=sizes - newest.counts), newest]
        scores = arena.side["scores"].transpose(0, 1) if sequences.reads_scores else None
        sinks = None if self.terms.sinks is None else self.terms.sinks.detach().float()
        terms = Terms(self.terms.scale, self.terms.softcap, sinks, scores=scores)
        output = states.new_empty(*states.shape[:2], value_size)
        with torch.no_grad():
            ops.attend(output, Queries(states.detach(), step.starts), segments, terms)
        return _NoGradient.apply(states, output) if states.requires_grad else output

    def _numbers(self, part: str, row: int, num_rows: int, size: int) -> Tensor:
        """See LayerStep; float32, the residual's as they were."""
        sequences, num_pages = self.sequences, -(-size // self.arena.page_size)
        ids = sequences.tables.ids[self.index, row : row + num_rows, :num_pages]
        pages = torch.from_numpy(ids.clip(0)).to(self.device)
        found = self.arena.entries(part, pages)[:, :, :size]
        if sequences.residual_pages:
            assert sequences.step is not None
            ends = sequences.step.sizes[self.index, row : row + num_rows].tolist()
            for own, end in enumerate(ends):
                newest = sequences.residual.entries(self.index, row + own, part[:-1])
                found[own, :, end - newest.shape[1] : end] = newest
        return found


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
