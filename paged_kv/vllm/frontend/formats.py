"""Page formats: from the user, in our words or in vLLM's, to a format for each layer.

vLLM's own code never sees a cache dtype that its CPU platform does not know: what becomes pages of
ours is taken out of its arguments before it looks at them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.kernels import cpu
from paged_kv.quant import make_layout
from paged_kv.vllm.frontend.refusals import (
    CACHE_DTYPES,
    check_groups,
    check_residual,
    refuse_packed,
)
from paged_kv.vllm.plan import GroupedPlan

AUTO = "auto"
FP8_DTYPES = ("fp8", "fp8_e4m3")


def take_cache_dtype(engine_args: Any, config: CompressionConfig) -> CompressionConfig:
    """The config with the page format that --kv-cache-dtype asks for; vLLM is left with auto.

    On a GPU these dtypes are vLLM's own. So is fp8 on a CPU, but under a policy, whose attention is
    ours, it means our format: a scale for each token and head instead of one for all.

    Raises:
        ValueError: options contradict each other, or the platform has no such pages.
    """
    if not current_platform.is_cpu():
        refuse_packed(config)
        return config
    cache_dtype = engine_args.kv_cache_dtype
    asked = CACHE_DTYPES.get(cache_dtype)
    under_policy = config.enabled and cpu.available()
    if cache_dtype in FP8_DTYPES and (under_policy or config.page_format == "fp8"):
        asked = "fp8"
    has_both = config.page_format != NATIVE and cache_dtype != AUTO
    if has_both and asked != config.page_format:
        raise ValueError(
            f"page_format {config.page_format} and kv-cache-dtype {cache_dtype} contradict each "
            "other: give one of them"
        )
    if asked is not None:
        config = dataclasses.replace(config, page_format=asked)
        engine_args.kv_cache_dtype = AUTO
    if config.page_format != NATIVE and engine_args.kv_cache_dtype_skip_layers:
        raise ValueError(
            f"kv-cache-dtype-skip-layers does not work with page_format {config.page_format}: a "
            'page_format file ({"layers": ["native", "int8", ...]}) says it for each layer'
        )
    check_residual(config)
    return config


def with_formats(
    plan: GroupedPlan, vllm_config: Any, config: CompressionConfig, full_layers: list[int]
) -> GroupedPlan:
    """The plan with the page format of each layer.

    Raises:
        ValueError: the model, or other options, do not go with packed pages.
    """
    if not current_platform.is_cpu():
        return plan
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    formats: tuple[str | None, ...]
    if config.page_format == NATIVE:
        native = bool(plan.budgets) and cpu.available() and _reads_native(vllm_config)
        formats = tuple(NATIVE if native and i in plan.budgets else None for i in range(num_layers))
    else:
        formats = layer_formats(config.page_format, num_layers)
        _check(plan, vllm_config, config, formats, hybrid=len(full_layers) < num_layers)
    return dataclasses.replace(plan, formats=formats, residual_pages=config.residual_pages)


def _reads_native(vllm_config: Any) -> bool:
    """Whether pages can be packed and hold what the model computes with."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    try:
        _make_layout(vllm_config, NATIVE)
    except ValueError:
        return False
    return kv_cache_dtype_str_to_dtype(cache.cache_dtype, model) == model.dtype


def _check(
    plan: GroupedPlan,
    vllm_config: Any,
    config: CompressionConfig,
    formats: tuple[str, ...],
    hybrid: bool,
) -> None:
    asked = f"page_format {config.page_format}"
    cache_dtype = vllm_config.cache_config.cache_dtype
    if is_quantized_kv_cache(cache_dtype):
        raise ValueError(f"{asked}: the model's own configuration asks for {cache_dtype} pages")
    check_groups(plan, config, formats, hybrid)
    for name in set(formats):
        _make_layout(vllm_config, name)
    page_size = vllm_config.cache_config.block_size
    config.check_residual(page_size, vllm_config.model_config.max_model_len)


def _make_layout(vllm_config: Any, name: str) -> None:
    model = vllm_config.model_config
    size = model.get_head_size()
    make_layout(name, model.dtype, size, size, vllm_config.cache_config.block_size)
