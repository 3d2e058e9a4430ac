"""What a sequence holds, as the plan says it: entries of each layer, and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paged_kv.bench.settings import model_config
from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.core.schedule import Schedule
from paged_kv.plan import make_plan


def layer_schedules(
    config: CompressionConfig, model: Path, page_size: int, engine: str = "vllm"
) -> list[Schedule | None]:
    """The schedule of each layer, None for one that keeps everything.

    Args:
        config: what is kept.
        model: a model directory.
        page_size: tokens per page.
        engine: reference or vllm, which refuses budgets that make too many groups of layers.

    Raises:
        ValueError: the budget or the page format does not fit the model, the page size or the
            engine.
    """
    from paged_kv.hf.arguments import check_page_format
    from paged_kv.tiers.files import check_spill_dir

    decoder = _decoder(model)
    num_layers = decoder["num_hidden_layers"]
    check_spill_dir(config.spill_dir)
    check_page_format(config, SimpleNamespace(**decoder), page_size)
    if not config.enabled:
        return [None] * num_layers
    full = full_layers(decoder.get("layer_types"), num_layers)
    plan = make_plan(config, page_size, num_layers, full)
    if engine == "vllm":
        from paged_kv.vllm.frontend.grouping import group_layers

        group_layers(plan, config, num_layers - len(full))
    return [plan.schedule(layer) for layer in range(num_layers)]


def entries(schedules: Sequence[Schedule | None], num_tokens: int, start: int) -> list[int]:
    """Held by each layer after so many tokens, by a sequence that keeps its budget from start."""
    return [
        num_tokens - (schedule.evicted(num_tokens, start) if schedule else 0)
        for schedule in schedules
    ]


def entry_bytes(
    config: CompressionConfig, model: Path, page_size: int, dtype: Any, native_bytes: int = 0
) -> list[int]:
    """Bytes of an entry in each layer, all KV heads.

    Args:
        config: has the page format.
        model: a model directory.
        page_size: tokens per page.
        dtype: torch's, of the model's keys and values.
        native_bytes: of a number in a native page; 0: the dtype's.
    """
    from paged_kv.quant import make_layout

    decoder = _decoder(model)
    heads = decoder["num_attention_heads"]
    kv_heads = decoder.get("num_key_value_heads") or heads
    size = decoder.get("head_dim") or decoder["hidden_size"] // heads
    native = 2 * size * (native_bytes or dtype.itemsize)
    return [
        kv_heads
        * (
            native
            if name == NATIVE
            else make_layout(name, dtype, size, size, page_size).entry_bytes
        )
        for name in layer_formats(config.page_format, decoder["num_hidden_layers"])
    ]


def full_layers(types: Sequence[str] | None, num_layers: int) -> list[int]:
    """Layers with full attention; the engines check again what a model says in other ways."""
    if types is None:
        return list(range(num_layers))
    return [layer for layer, kind in enumerate(types) if kind == "full_attention"]


def _decoder(model: Path) -> dict[str, Any]:
    config = model_config(model)
    decoder: dict[str, Any] = config.get("text_config", config)
    return decoder
