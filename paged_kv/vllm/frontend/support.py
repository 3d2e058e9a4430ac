"""What works under a policy and what is refused: the checks before any process starts.

Fail closed: what was not thought through is refused by name, never silently wrong.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.model_rules import full_attention_layers, refused_attention
from paged_kv.plan import make_plan
from paged_kv.vllm.frontend.formats import with_formats
from paged_kv.vllm.frontend.grouping import group_layers
from paged_kv.vllm.frontend.refusals import (
    NO_FULL_ATTENTION,
    check_cache_dtype,
    refuse,
    too_many_ranks,
    unsupported,
)
from paged_kv.vllm.plan import GroupedPlan
from paged_kv.vllm.swap.options import is_ours
from paged_kv.vllm.worker.worker import WORKERS

logger = init_logger(f"vllm.{__name__}")

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def check_arguments(engine_args: Any, config: CompressionConfig) -> None:
    """Refuses what vLLM would change, load or stumble over before check could see it.

    Raises:
        ValueError: names what is unsupported.
    """
    check_model_directory(engine_args.model, engine_args.load_format)
    refuse(
        config,
        {
            "prefill context parallelism": engine_args.prefill_context_parallel_size > 1,
            "dual-batch overlap": engine_args.enable_dbo or engine_args.ubatch_size > 1,
        },
    )


def check_model_directory(model: str, load_format: str) -> None:
    """Raises ValueError for a directory that holds no weights, where vLLM would look for some."""
    path = Path(model)
    if load_format not in ("auto", "hf", "safetensors", "pt") or not path.is_dir():
        return
    if not any(match for pattern in _WEIGHTS for match in path.glob(pattern)):
        raise ValueError(f"model directory {model} holds no weights ({', '.join(_WEIGHTS)})")


def check(vllm_config: Any, config: CompressionConfig) -> GroupedPlan:
    """Refuses unsupported models and features; returns the plan for the others. Logs it.

    Raises:
        ValueError: names what is unsupported.
    """
    _check_model(vllm_config.model_config, config)
    _check_features(vllm_config, config)
    hf_config = vllm_config.model_config.hf_text_config
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    full_layers = full_attention_layers(hf_config, num_layers)
    if not full_layers and (config.enabled or config.page_format != NATIVE):
        raise unsupported(config, NO_FULL_ATTENTION)
    check_cache_dtype(vllm_config.cache_config.cache_dtype, config)
    page_size = vllm_config.cache_config.block_size
    plan = GroupedPlan(page_size, False, {}, 0, 1, num_layers)
    if config.enabled:
        if len(full_layers) < num_layers:
            logger.info("paged_kv leaves the layers that have no full attention as they are")
        budgets = make_plan(config, page_size, num_layers, full_layers)
        plan = group_layers(budgets, config, num_layers - len(full_layers))
        when = ", once pages run out" if config.waits_for_pressure else ""
        logger.info("paged_kv %s keeps%s: %s", config.policy, when, plan.describe())
    plan = with_formats(plan, vllm_config, config, full_layers)
    names = Counter(name or "as vLLM has them" for name in plan.formats)
    logger.info(
        "paged_kv page formats: %s", ", ".join(f"{n} x {name}" for name, n in names.items())
    )
    return plan


def _check_model(model_config: Any, config: CompressionConfig) -> None:
    refused = {
        "a pooling model": model_config.runner_type == "pooling",
        "multi-head latent attention (MLA)": model_config.use_mla,
        "a model without attention": model_config.is_attention_free,
        "a model with Mamba or linear-attention layers": model_config.is_hybrid,
        "an encoder-decoder model": model_config.is_encoder_decoder,
        "a diffusion model": model_config.is_diffusion,
        "bidirectional multimodal prefixes": model_config.is_mm_prefix_lm,
        "reference sliding-window attention": getattr(model_config, "rswa_window", None)
        is not None,
    }
    refuse(config, refused)
    refuse(config, refused_attention(model_config.hf_text_config))


def _check_features(vllm_config: Any, config: CompressionConfig) -> None:
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    refuse(
        config,
        {
            "speculative decoding": vllm_config.speculative_config is not None,
            "decode context parallelism": parallel.decode_context_parallel_size > 1,
            "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
            "dual-batch overlap": parallel.use_ubatching,
            "KV connectors": not (transfer is None or (config.swap_space and is_ours(transfer))),
            "pipeline parallelism with kv-swap-space": config.swap_space > 0
            and parallel.pipeline_parallel_size > 1,
            "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
            "--disable-hybrid-kv-cache-manager": bool(scheduler.disable_hybrid_kv_cache_manager),
            f"the scheduler class {scheduler.scheduler_cls}": scheduler.scheduler_cls is not None,
            f"the worker class {parallel.worker_cls}": parallel.worker_cls not in WORKERS,
            "HiSparse": vllm_config.attention_config.hisparse_config is not None,
            # Its store keeps what belongs to a page, and has as many places as there are pages.
            "--enable-return-routed-experts": vllm_config.aux_output_config.enabled,
            # A piece of a prompt may be shorter than an image, which would wait for ever.
            "--disable-chunked-mm-input with compress_prefill": config.compress_prefill
            and scheduler.disable_chunked_mm_input,
            f"--kv-cache-dtype-skip-layers with --kv-cache-dtype {cache.cache_dtype}": bool(
                config.enabled and cache.kv_cache_dtype_skip_layers
            )
            and is_quantized_kv_cache(cache.cache_dtype),
        },
    )
    shards = parallel.tensor_parallel_size
    kv_heads = vllm_config.model_config.get_total_num_kv_heads()
    refuse(config, too_many_ranks(shards, kv_heads))
