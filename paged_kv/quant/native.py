"""native: numbers as the model has them."""

from __future__ import annotations

import torch

from paged_kv.kernels.page_layout import Codec

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Native(Codec):
    """Nothing is lost.

    Args:
        size: see Codec.
        dtype: of the model's keys and values.

    Raises:
        ValueError: a dtype that packed pages cannot hold.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__(size)
        if dtype not in CODES:
            raise ValueError(f"dtype {dtype}: packed pages hold {', '.join(map(str, CODES))}")
        self.dtype = dtype

    @property
    def code(self) -> int:  # type: ignore[override]
        """By dtype."""
        return CODES[self.dtype]

    @property
    def data_bytes(self) -> int:
        """The dtype's."""
        return self.size * self.dtype.itemsize

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers that are too large become infinite, as in the model."""
        return numbers.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 numbers of stored bytes."""
        return bits.contiguous().view(self.dtype).float()
