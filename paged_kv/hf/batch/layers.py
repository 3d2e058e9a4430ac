"""Which Sequences hold the layers of a model in a batch.

Layers with full attention follow the policy and its page format. Those with a sliding window keep
the window, which is a policy, too; what is not dropped yet because pages are dropped whole, a mask
hides.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import Schedule
from paged_kv.hf import seams
from paged_kv.hf.arguments import check_page_format, settle
from paged_kv.hf.modes import keeps
from paged_kv.hf.pool import PagePool
from paged_kv.hf.sequences import Sequences


@keeps
def make_parts(model: Any, compression: CompressionConfig, pool: PagePool) -> list[Sequences]:
    """Sequences that together hold all layers of a model, without a row yet.

    Raises:
        ValueError: layers that have no pages; budgets or a policy that do not fit the model.
    """
    config = model.config.get_text_config(decoder=True)
    types, arguments = get_layer_types_and_kwargs(config)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if model.config.is_encoder_decoder or getattr(config, "num_kv_shared_layers", 0) or unknown:
        what = ", ".join(sorted(unknown)) or "an encoder, or layers that share a cache"
        raise ValueError(f"generate_batch cannot run this model, which has {what}: use generate()")
    if "full_attention" not in types:
        raise ValueError("no layer of this model has full attention")
    if compression.enabled:
        compression.check_page_size(pool.page_size)
    check_page_format(compression, config, pool.page_size)
    compression = settle(compression, model.config)
    by_kind: dict[Any, list[int]] = {None: []}
    for layer, more in enumerate(arguments):
        by_kind.setdefault(more.get("sliding_window"), []).append(layer)
    parts = [
        Sequences(
            compression if window is None else _keeping(window, pool.page_size),
            layers,
            len(types) if window is None else len(layers),
            pool,
            is_private=False,
        )
        for window, layers in by_kind.items()
    ]
    parts[0].rotary = seams.rotary_of(model)
    return parts


def check_rope(part: Sequences, length: int) -> None:
    """Requests of all lengths share forward passes, whose longest decides what turns the keys.

    Args:
        part: whose policy may read RoPE.
        length: of the longest request.

    Raises:
        ValueError: see Rope.after.
    """
    for longest in (1, length):
        part.rotary = part.rope_after(longest)


def _keeping(window: int, page_size: int) -> CompressionConfig:
    """The last `window` tokens, always, in the model's dtype."""
    return CompressionConfig(
        policy="window",
        budget=window + page_size,
        num_sink_tokens=0,
        recent_window=window,
        compress_prefill=True,
    )


def schedules(part: Sequences) -> list[Schedule | None]:
    """Of each layer held there."""
    result: list[Schedule | None] = [None] * len(part.layers)
    for schedule, layers in part.groups:
        for layer in layers:
            result[layer] = schedule
    return result
