"""Which of a model's layers can be compressed, and what is refused, by its config alone.

A config is one of transformers, that of the decoder, or what config.json says, as attributes.
"""

from __future__ import annotations

from typing import Any


def full_attention_layers(config: Any, num_layers: int) -> list[int]:
    """The layers without a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [layer for layer in range(num_layers) if types[layer] == "full_attention"]
    if uses_window(config):
        return []
    return list(range(num_layers))


def uses_window(config: Any) -> bool:
    """Whether layers have a sliding window, if the config does not say which."""
    window = getattr(config, "sliding_window", None)
    return window is not None and bool(getattr(config, "use_sliding_window", True))


def refused_attention(config: Any) -> dict[str, bool]:
    """Kinds of attention that are refused, and whether the model has them."""
    return {
        "layers that share their KV cache": bool(getattr(config, "num_kv_shared_layers", 0)),
        "ALiBi position biases": bool(getattr(config, "alibi", False))
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type in ("bloom", "step1"),
        "chunked local attention": bool(getattr(config, "attention_chunk_size", None)),
    }
