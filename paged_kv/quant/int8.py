"""int8: symmetric, one scale per token and KV head."""

from __future__ import annotations

import torch

from paged_kv.kernels.page_layout import Codec, scales_of, scales_to_bytes

LIMIT = 127


class Int8(Codec):
    """number = code * scale, scale = max|number| / 127 in bfloat16.

    An entry with a NaN or an infinity comes back as NaN, and no other entry does.
    """

    code = 3
    num_scales = 1

    @property
    def data_bytes(self) -> int:
        """A byte per number."""
        return self.size

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """See Codec. Rounds half to even."""
        scale, factor = symmetric_scale(numbers, LIMIT)
        codes = (numbers / factor).round().clamp(-LIMIT, LIMIT)
        codes = torch.where(scale > 0, codes, 0.0).to(torch.int8)
        return torch.cat([codes.view(torch.uint8), scales_to_bytes(scale)], -1)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """See Codec."""
        codes = bits[..., : self.size].view(torch.int8).float()
        return codes * scales_of(bits[..., self.size :])


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
