"""Kernels of a GPU for tests whose tensors lie on the CPU, where the reference computes.

PAGED_KV_DEVICE=cuda runs triton_cases.py on a GPU (benchmarks/gpu/kernels_right.py does): operands
are copied there, and what a kernel has written is copied back. With cpu the copies are made, too.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from paged_kv.kernels.index import Index
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout

Tensor = torch.Tensor
DEVICE = os.environ.get("PAGED_KV_DEVICE", "")


def chosen(kernels: Any) -> Any:
    """The kernels as they are, or those of the device that PAGED_KV_DEVICE names."""
    return _OnDevice(kernels, DEVICE) if DEVICE else kernels


class _OnDevice:
    """A protocol.Kernels of CPU tensors.

    Args:
        kernels: of the device.
        device: where they run.
    """

    def __init__(self, kernels: Any, device: str) -> None:
        self.kernels, self.device = kernels, torch.device(device)

    def write(
        self, blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        there = self._there(blocks)
        self.kernels.write(there, layout, *map(self._there, (keys, values, slots)))
        blocks.copy_(there)

    def gather(
        self, stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor
    ) -> Tensor:
        operands = self._there(stack), layout, part, self._there(layers), self._there(pages)
        return self._checked(self.kernels.gather(*operands))

    def store(
        self, stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor
    ) -> None:
        there = self._there(stack)
        self.kernels.store(there, layout, part, self._index(index), self._there(numbers))
        stack.copy_(there)

    def move(
        self, stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index
    ) -> None:
        there = self._there(stack)
        self.kernels.move(there, layout, part, self._index(source), self._index(target))
        stack.copy_(there)

    def attend(
        self, output: Tensor, queries: Queries, segments: list[Segment], terms: Terms, side: Side
    ) -> None:
        result = self._there(output)
        asked = Queries(*map(self._there, queries))
        held = [
            Segment(
                self._there(segment.blocks),
                segment.layout,
                self._there(segment.table),
                self._there(segment.counts),
            )
            for segment in segments
        ]
        beside = Side(self._there(side.weights), self._there(side.scores), side.decay)
        self.kernels.attend(result, asked, held, self._terms(terms), beside)
        output.copy_(result)
        if side.scores is not None:
            side.scores.copy_(beside.scores)

    def attention_mass(self, attention: DenseAttention, largest: bool = False) -> Tensor:
        tensors = map(self._there, attention[:-1])
        there = DenseAttention(*tensors, self._terms(attention.terms))
        return self._checked(self.kernels.attention_mass(there, largest))

    def _there(self, tensor: Any) -> Any:
        """A copy that is the same view of the same memory. None stays."""
        if tensor is None:
            return None
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        there = memory.to(self.device, copy=True)
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _index(self, index: Index) -> Any:
        return tuple(map(self._there, index))

    def _terms(self, terms: Terms) -> Terms:
        return terms._replace(sinks=self._there(terms.sinks))

    def _checked(self, result: Tensor) -> Tensor:
        assert result.device.type == self.device.type
        return result.cpu()
