"""int8: rotated, symmetric, one scale per token and KV head.

Without the rotation (see int4) the error of keys is twice as large.
"""

from __future__ import annotations

import torch

from paged_kv.kernels.page_layout import (
    Codec,
    hadamard_block,
    rotate,
    scales_of,
    scales_to_bytes,
)

LIMIT = 127


class Int8(Codec):
    """rotated number = code * scale, scale = max|rotated number| / 127 in bfloat16.

    An entry with a NaN or an infinity comes back as NaN, and no other entry does.

    Args:
        size: see Codec.
    """

    code = 3
    num_scales = 1

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.rotation = hadamard_block(size)

    @property
    def data_bytes(self) -> int:
        """A byte per number."""
        return self.size

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Bytes of float32 numbers. Rounds half to even."""
        rotated = rotate(numbers, self.rotation)
        scale, factor = symmetric_scale(rotated, LIMIT)
        codes = (rotated / factor).round().clamp(-LIMIT, LIMIT)
        codes = torch.where(scale > 0, codes, 0.0).to(torch.int8)
        return torch.cat([codes.view(torch.uint8), scales_to_bytes(scale)], -1)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 numbers of stored bytes."""
        codes = bits[..., : self.size].view(torch.int8).float()
        return rotate(codes * scales_of(bits[..., self.size :]), self.rotation)


def symmetric_scale(numbers: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, divisor), float32 [..., 1].

    The scale is bfloat16's nearest to max|number| / limit, NaN if that is not finite; the divisor
    is the scale where it is a positive number, else 1.
    """
    # amax does not promise to keep a NaN; a sum of absolute values does.
    amax = numbers.abs().amax(-1, keepdim=True)
    scale = (amax / limit).to(torch.bfloat16).float()
    finite = numbers.isfinite().all(-1, keepdim=True) & scale.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    return scale, torch.where(scale > 0, scale, 1.0)
