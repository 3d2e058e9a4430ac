"""Pages in memory as vLLM's compiled kernels for CPUs write them."""

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  sets the environment before torch and vLLM are imported
import torch
from stores import skip_without_fp8

FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Exact in every dtype, 8 bits included.
VALUES = torch.tensor([-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])


def cpu_layer(
    dtype: torch.dtype, page_size: int, cache_dtype: str = "auto", head_size: int = 64
) -> Any:
    """An Attention layer of a model with 4 query and 2 KV heads, as vLLM builds it on CPU."""
    from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    skip_without_fp8(cache_dtype)
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=dtype, is_mm_prefix_lm=False, rswa_window=None)
    cache_config = CacheConfig(block_size=page_size, cache_dtype=cache_dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(config):
            layer = Attention(4, head_size, 0.125, 2, cache_config=cache_config, prefix="0.attn")
    finally:
        torch.set_default_dtype(default)
    layer.isa = _get_attn_isa(dtype, page_size, head_size, cache_dtype)  # the builder's work
    return layer


def write_through_kernel(layer: Any, cache: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Fills the slots `used` by vLLM's kernel; returns the entries [slots, heads, K | V]."""
    heads, content = cache.shape[1], cache.shape[3]
    shape = (2, len(used), heads, content // 2)
    key, value = VALUES[torch.randint(len(VALUES), shape)].to(layer.dtype)
    layer.impl.do_kv_cache_update(layer, key, value, cache, used)
    return torch.cat([key, value], -1)


def as_numbers(cache: torch.Tensor, cache_dtype: str) -> torch.Tensor:
    return (cache.view(FP8[cache_dtype]) if cache_dtype in FP8 else cache).float()
