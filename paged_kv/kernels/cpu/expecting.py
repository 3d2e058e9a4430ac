"""A call of expected_attention: operands as rows, and memory for what is found."""

from __future__ import annotations

import torch

from paged_kv.kernels.cpu import structs
from paged_kv.kernels.operands import Expected
from paged_kv.kernels.rotary import Rotary

Tensor = torch.Tensor
SIZES = 16, 1024  # of a key: a multiple of the first, at most the second


def takes(keys: Tensor) -> bool:
    """Whether the kernel can compute it."""
    step, most = SIZES
    return keys.dtype == torch.float32 and keys.shape[-1] % step == 0 and keys.shape[-1] <= most


class Call:
    """Operands are as in reference.expected_attention, and kept until the call is over.

    Attributes:
        work: the struct.
        found: float32 [layers, events, kv_heads, m], to be written.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, positions: Tensor, rotary: Rotary, expected: Expected
    ) -> None:
        *lead, entries, size = keys.shape
        self.found = torch.empty(*lead, entries)
        # Entries that have not moved are the same tokens in all layers and heads: one table then.
        same = positions[:1, :, :1]
        if torch.equal(positions, same.expand_as(positions)):
            positions = same
        cos, sin = (part.flatten(-2) for part in rotary.at(positions, back=True))
        turns = [part.expand(*lead, part.shape[-1]) for part in (cos, sin)]
        dense = [part.contiguous() for part in (keys, values, *expected)]
        self._operands = [*turns, *dense]
        self.work = structs.ExpectedStruct(
            dense[0].data_ptr(),
            dense[1].data_ptr(),
            *map(structs.rows_struct, turns),
            *(part.data_ptr() for part in dense[2:]),
            self.found.data_ptr(),
            (structs.Number * 3)(*lead),
            entries,
            size,
            values.shape[-1],
            len(rotary.frequencies),
            expected.linear.shape[-2],
            rotary.neox,
        )
