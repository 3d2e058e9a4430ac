"""Refusals that need no vLLM: its plugin makes them at the start, `paged-kv capacity` before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.vllm.plan import GroupedPlan

CACHE_DTYPES = {"int8_per_token_head": "int8", "int4_per_token_head": "int4"}
READABLE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
# Whose entries can be moved: all bytes of one, its scales too, lie together. In nvfp4's pages they
# do not (all data come before all scales); of the others nobody has shown it.
MOVABLE_DTYPES = (*READABLE_DTYPES, *CACHE_DTYPES, "fp8_per_token_head")
NO_FULL_ATTENTION = "a model without full-attention layers (all have a sliding window)"


def refuse(config: CompressionConfig, refused: Mapping[str, bool]) -> None:
    """Raises ValueError for the first thing that is there."""
    for what, present in refused.items():
        if present:
            raise unsupported(config, what)


def unsupported(config: CompressionConfig, what: str) -> ValueError:
    """An error that names the option and what it does not go with."""
    asked = "kv-swap-space" if config.swap_space else "kv-policy"
    if config.page_format != NATIVE:
        asked = f"page_format {config.page_format}"
    if config.enabled:
        asked = "kv-policy"
    return ValueError(f"{asked} does not support {what}")


def too_many_ranks(num_ranks: int, num_kv_heads: int) -> dict[str, bool]:
    """As refuse takes it."""
    return {f"more ranks ({num_ranks}) than KV heads ({num_kv_heads})": num_ranks > num_kv_heads}


def refuse_packed(config: CompressionConfig) -> None:
    """On a platform whose page formats are vLLM's own. Raises ValueError."""
    if config.page_format != NATIVE:
        raise ValueError(
            f"page_format {config.page_format} works on CPU only; on this platform vLLM has page "
            f"formats of its own: --kv-cache-dtype fp8, {', '.join(CACHE_DTYPES)}"
        )
    if config.residual_pages:
        raise ValueError(f"residual_pages {config.residual_pages} works on CPU only")


def check_residual(config: CompressionConfig) -> None:
    """Raises ValueError for a residual without quantized pages."""
    if config.residual_pages and config.page_format == NATIVE:
        raise ValueError(
            f"residual_pages {config.residual_pages} needs a page_format other than native"
        )


def check_groups(
    plan: GroupedPlan, config: CompressionConfig, formats: Sequence[str], hybrid: bool
) -> None:
    """Refuses page formats that do not go with the model's KV cache groups.

    Args:
        plan: has the groups.
        config: the options.
        formats: of each layer.
        hybrid: whether some layers have a sliding window.

    Raises:
        ValueError: names the format.
    """
    asked = f"page_format {config.page_format}"
    if hybrid:
        # Pages of all groups have one size: vLLM would fill up ours.
        raise ValueError(f"{asked} does not support a model with sliding-window layers")
    if len(set(formats)) > 1 and plan.num_groups + plan.num_other_groups > 1:
        raise ValueError(
            f"{asked}: layers of different formats cannot have different budgets (a pyramid, or "
            "skip_layers): pages of all KV cache groups have one size"
        )


def check_cache_dtype(cache_dtype: str, config: CompressionConfig) -> None:
    """Refuses pages whose entries cannot be moved, or read by what reads them.

    Args:
        cache_dtype: of vLLM, not auto where a checkpoint says another.
        config: with a policy, or with a swap.

    Raises:
        ValueError: names the dtype and those that are possible.
    """
    asked, reader = f"the cache dtype {cache_dtype}", None
    if config.enabled:
        if cache_dtype not in MOVABLE_DTYPES:
            possible = ", ".join(MOVABLE_DTYPES)
            raise unsupported(config, f"{asked}: it moves entries of {possible}")
        policy = config.create_policy()
        if policy.observation_window > 0 or policy.reads:
            reader = f"{config.selector}, which reads the cache"
    if config.swap_format != NATIVE:
        reader = f"swap_format {config.swap_format}, which converts it"
    if reader and cache_dtype not in READABLE_DTYPES:
        possible = ", ".join(READABLE_DTYPES)
        raise unsupported(config, f"{asked} with {reader}; it reads {possible}")
