"""What page formats come to in plain numbers, and in a cache of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from paged_kv.kernels.page_layout import Codec
from paged_kv.quant import QUANTIZED


def stored(codec: Codec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers))


def coded_cache(model: Any, page_format: str) -> DynamicCache:
    """transformers' cache, whose full layers hold what the codec makes of keys and values."""

    class Coded(DynamicCache):
        def update(self, key: Any, value: Any, layer: int, *args: Any, **more: Any) -> Any:
            if not self.layers[layer].is_sliding:
                codec = QUANTIZED[page_format](key.shape[-1])
                key, value = stored(codec, key), stored(codec, value)
            return super().update(key, value, layer, *args, **more)

    return Coded(config=model.config)
