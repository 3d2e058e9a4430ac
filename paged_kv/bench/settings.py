"""Sizes of a model's cache, and prompts to measure with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from paged_kv.vllm.driver.workload import Tokens

KV_DTYPE_BYTES = 2  # bfloat16


def decoder_config(model: Path) -> dict[str, Any]:
    """The decoder's part of a model directory's config.json: all of it, or its text_config."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    decoder: dict[str, Any] = config.get("text_config", config)
    return decoder


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of the keys and values of one token in all layers. Raises ValueError."""
    config = decoder_config(model)
    try:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values: int = 2 * config["num_hidden_layers"] * kv_heads * head_dim
    except KeyError as error:
        raise ValueError(f"model {model}: its config.json has no {error.args[0]}") from None
    return values * KV_DTYPE_BYTES


def random_prompts(model: Path, count: int, length: int, seed: int) -> list[Tokens]:
    """Token ids without meaning: only their number matters to the speed of an engine."""
    generator = random.Random(seed)
    vocabulary = decoder_config(model)["vocab_size"]
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
