"""fp8: e4m3, one scale per token and KV head."""

from __future__ import annotations

import torch

from paged_kv.kernels.page_layout import Codec, scales_of, scales_to_bytes
from paged_kv.quant.int8 import symmetric_scale

LIMIT = 448.0  # the largest e4m3 number


class Fp8(Codec):
    """number = e4m3 * scale, scale = max|number| / 448 in bfloat16. NaNs as in int8."""

    code = 5
    num_scales = 1

    @property
    def data_bytes(self) -> int:
        """A byte per number."""
        return self.size

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Bytes of float32 numbers. Rounds half to even."""
        scale, factor = symmetric_scale(numbers, LIMIT)
        codes = (numbers / factor).clamp(-LIMIT, LIMIT)
        codes = torch.where(scale > 0, codes, 0.0).to(torch.float8_e4m3fn)
        return torch.cat([codes.view(torch.uint8), scales_to_bytes(scale)], -1)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 numbers of stored bytes."""
        codes = bits[..., : self.size].view(torch.float8_e4m3fn).float()
        return codes * scales_of(bits[..., self.size :])
