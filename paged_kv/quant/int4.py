"""int4: two numbers per byte, rotated, a scale and a minimum per token, KV head and group.

Chosen by measured error (docs/experiments.md): without the rotation the few large channels of keys
leave no levels for the others; groups of 32 channels and a minimum beat a single symmetric scale;
a search for better scales, or levels that are not evenly spaced, gain less than they cost.
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

LEVELS = 15


class Int4(Codec):
    """rotated number = code * scale + minimum, both bfloat16, per group of channels.

    Byte b holds number 2b in its low half and 2b + 1 in its high half. NaNs as in int8.

    Args:
        size: see Codec.
    """

    code = 4

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.rotation = hadamard_block(size)
        self.num_groups = size // (32 if size % 32 == 0 else 16)
        self.num_scales = 2 * self.num_groups  # all scales, then all minimums

    @property
    def data_bytes(self) -> int:
        """Half a byte per number."""
        return self.size // 2

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Bytes of float32 numbers. Rounds half to even."""
        groups = rotate(numbers, self.rotation).unflatten(-1, (self.num_groups, -1))
        finite = numbers.isfinite().all(-1, keepdim=True)
        low = groups.amin(-1).to(torch.bfloat16).float()
        scale = ((groups.amax(-1) - low) / LEVELS).to(torch.bfloat16).float()
        finite = finite & scale.isfinite() & low.isfinite()
        scale = torch.where(finite, scale, torch.nan)
        factor = torch.where(scale > 0, scale, 1.0)[..., None]
        codes = ((groups - low[..., None]) / factor).round().clamp(0, LEVELS)
        codes = torch.where(scale[..., None] > 0, codes, 0.0).to(torch.uint8).flatten(-2)
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return torch.cat([packed, scales_to_bytes(torch.cat([scale, low], -1))], -1)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 numbers of stored bytes."""
        packed, scales = bits[..., : self.data_bytes], scales_of(bits[..., self.data_bytes :])
        scale, low = scales.chunk(2, -1)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
        groups = codes.unflatten(-1, (self.num_groups, -1)) * scale[..., None] + low[..., None]
        return rotate(groups.flatten(-2), self.rotation)
