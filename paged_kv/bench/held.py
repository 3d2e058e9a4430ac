"""What a sequence holds, as the plan says it: entries of each layer, and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from paged_kv.bench.settings import decoder_config
from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.core.schedule import Schedule
from paged_kv.model_rules import check_layer_types, full_attention_layers, layer_windows
from paged_kv.plan import make_plan


class SlidingWindow(NamedTuple):
    """What a layer holds that a policy leaves alone and that sees the last tokens only."""

    size: int

    def evicted(self, num_tokens: int, start: int) -> int:
        """As Schedule.evicted: entries that no query sees any more, whatever the start."""
        return max(0, num_tokens - self.size)


LayerSchedule = Schedule | SlidingWindow | None  # None: the layer keeps everything


def layer_schedules(
    config: CompressionConfig, model: Path, page_size: int, engine: str = "vllm"
) -> list[LayerSchedule]:
    """The schedule of each layer.

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

    decoder = SimpleNamespace(**decoder_config(model))
    num_layers = decoder.num_hidden_layers
    check_layer_types(f"model {model.name}", decoder)
    check_spill_dir(config.spill_dir)
    check_page_format(config, decoder, page_size)
    windows = layer_windows(decoder, num_layers)
    schedules: list[LayerSchedule] = [SlidingWindow(size) if size else None for size in windows]
    if not config.enabled:
        return schedules
    full = full_attention_layers(decoder, num_layers)
    plan = make_plan(config, page_size, num_layers, full)
    if engine == "vllm":
        from paged_kv.vllm.frontend.grouping import group_layers

        group_layers(plan, config, num_layers - len(full))
    return [plan.schedule(layer) or schedules[layer] for layer in range(num_layers)]


def entries(schedules: Sequence[LayerSchedule], num_tokens: int, start: int) -> list[int]:
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

    decoder = decoder_config(model)
    num_layers, heads = decoder["num_hidden_layers"], decoder["num_attention_heads"]
    kv_heads = decoder.get("num_key_value_heads") or heads
    size = decoder.get("head_dim") or decoder["hidden_size"] // heads
    sizes = {NATIVE: 2 * size * (native_bytes or dtype.itemsize)}
    formats = list(layer_formats(config.page_format, num_layers))
    for layer, window in enumerate(layer_windows(SimpleNamespace(**decoder), num_layers)):
        formats[layer] = NATIVE if window else formats[layer]
    for name in set(formats) - {NATIVE}:
        sizes[name] = make_layout(name, dtype, size, size, page_size).entry_bytes
    return [kv_heads * sizes[name] for name in formats]
