"""Which of a model's layers can be compressed, and what is refused, by its config alone.

A config is one of transformers, that of the decoder, or what config.json says, as attributes.
"""

from __future__ import annotations

from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number; what models run in
ALL_SLIDING = ("mistral", "mixtral")  # where a sliding_window without layer_types is every layer's


def full_attention_layers(config: Any, num_layers: int) -> list[int]:
    """The layers without a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [layer for layer in range(num_layers) if types[layer] == "full_attention"]
    if uses_window(config):
        return []
    return list(range(num_layers))


def layer_windows(config: Any, num_layers: int) -> list[int | None]:
    """How many of the last tokens each layer sees, the newest included; None: all."""
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if uses_window(config) else "full_attention"] * num_layers
    window: int | None = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in types[:num_layers]]


def check_layer_types(where: str, config: Any) -> None:
    """Refuses a config.json that leaves open which layers have a window. Raises ValueError.

    Args:
        where: names the model.
        config: what config.json says: transformers adds layer_types when it reads one.
    """
    types = getattr(config, "layer_types", None)
    if uses_window(config) and not types and config.model_type not in ALL_SLIDING:
        raise ValueError(
            f"{where}: its config.json has a sliding_window, but no layer_types that says which "
            "layers it is for; load and save the config with transformers, which adds them"
        )


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
