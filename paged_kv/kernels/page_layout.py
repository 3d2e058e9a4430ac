"""Packed pages: where the bytes of an entry lie, the same for every kernel.

A page is a block of bytes per KV head, so that a head's keys and values are read in one stream:

    keys' words | values                | keys' scales   | values' scales
    [w][slot]   | [slot][value bytes]   | [scale][slot]  | [scale][slot]

A key's bytes are cut into 32-bit words, and word w of all slots lies together: one vector register
takes the same word of 16 slots, so a dot product needs no sum across lanes. A value's bytes lie
together: one register takes neighbouring numbers of a slot. Scales are bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

WORD = 4  # bytes
SCALE_BYTES = 2


class Codec(ABC):
    """How the numbers of a key, or of a value, become bytes; see paged_kv.quant.

    Args:
        size: numbers of a key or a value, a multiple of 16.
    """

    code: ClassVar[int]  # the format's number in the C++ and Triton kernels
    num_scales: int = 0  # bfloat16 numbers per entry
    rotation: int = 1  # size of the Hadamard blocks that numbers are rotated in; 1 for none

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    @abstractmethod
    def data_bytes(self) -> int:
        """Bytes of an entry's numbers, without scales; a multiple of WORD."""

    @property
    def num_bytes(self) -> int:
        """Bytes of an entry, scales included."""
        return self.data_bytes + SCALE_BYTES * self.num_scales

    @abstractmethod
    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """uint8 [..., num_bytes] of float32 [..., size]: data, then scales."""

    @abstractmethod
    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 [..., size] of what encode gives."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


@dataclass(frozen=True)
class PageLayout:
    """See the module.

    Args:
        key: how a key is stored.
        value: how a value is stored.
        page_size: slots per page, a multiple of 16.
    """

    key: Codec
    value: Codec
    page_size: int

    @property
    def value_offset(self) -> int:
        """Byte of the block at which the values begin; the keys begin at 0."""
        return self.page_size * self.key.data_bytes

    @property
    def key_scale_offset(self) -> int:
        """Byte at which the keys' scales begin."""
        return self.value_offset + self.page_size * self.value.data_bytes

    @property
    def value_scale_offset(self) -> int:
        """Byte at which the values' scales begin."""
        return self.key_scale_offset + self.page_size * SCALE_BYTES * self.key.num_scales

    @property
    def entry_bytes(self) -> int:
        """Bytes of a key and a value."""
        return self.key.num_bytes + self.value.num_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a page per KV head."""
        return self.page_size * self.entry_bytes

    @cached_property
    def elements(self) -> torch.Tensor:
        """int64 [page_size, entry_bytes]: where in a block the bytes of each slot lie.

        Columns: the key's bytes as its codec gives them, then the value's.
        """
        slot = torch.arange(self.page_size)[:, None]

        def scales(offset: int, codec: Codec) -> torch.Tensor:
            byte = torch.arange(SCALE_BYTES * codec.num_scales)
            row = byte // SCALE_BYTES * self.page_size + slot
            return offset + row * SCALE_BYTES + byte % SCALE_BYTES

        byte = torch.arange(self.key.data_bytes)
        keys = (byte // WORD * self.page_size + slot) * WORD + byte % WORD
        values = self.value_offset + slot * self.value.data_bytes
        values = values + torch.arange(self.value.data_bytes)
        key_scales = scales(self.key_scale_offset, self.key)
        return torch.cat([keys, key_scales, values, scales(self.value_scale_offset, self.value)], 1)


def scales_to_bytes(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2 * n] of float32 [..., n] that bfloat16 can hold."""
    # Cloned: without an entry it would count as contiguous whatever its strides, with no such view.
    return scales.to(torch.bfloat16).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def scales_of(bits: torch.Tensor) -> torch.Tensor:
    """What scales_to_bytes was given."""
    return bits.contiguous().view(torch.bfloat16).float()


def hadamard_block(size: int) -> int:
    """The largest blocks that so many numbers can be rotated in: a power of two divides them."""
    return size & -size


def rotate(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks of `size` (a power of two) times the orthonormal Hadamard matrix: its own inverse.

    Outliers in a few channels, which keys after RoPE have, are spread over all of a block, so that
    few levels serve all of its numbers; dot products stay as they are.
    """
    if size == 1:
        return numbers
    blocks = numbers.unflatten(-1, (-1, size))
    step = 1
    while step < size:
        pairs = blocks.unflatten(-1, (-1, 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack([low + high, low - high], -2).flatten(-3)
        step *= 2
    return (blocks * size**-0.5).flatten(-2)
