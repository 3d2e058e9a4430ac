"""Sizes of a model's cache, and prompts to measure with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from paged_kv.model_rules import DTYPE_BYTES
from paged_kv.vllm.driver.workload import Tokens

BFLOAT16 = "bfloat16"
AUTO = "auto"


def resolved_dtype(name: str) -> str:
    """A key of DTYPE_BYTES. AUTO: that of two bytes with which this machine is fast, if any.

    Processors without AVX-512 and older GPUs emulate bfloat16.
    """
    import torch

    if name != AUTO:
        return name
    if torch.cuda.is_available():
        return BFLOAT16 if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has_onednn = torch.backends.mkldnn.is_available()
    return BFLOAT16 if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def decoder_config(model: Path) -> dict[str, Any]:
    """The decoder's part of a model directory's config.json: all of it, or its text_config."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    decoder: dict[str, Any] = config.get("text_config", config)
    return decoder


def kv_bytes_per_token(model: Path, dtype: str = BFLOAT16) -> int:
    """Bytes of the keys and values of one token in all layers. Raises ValueError."""
    config = decoder_config(model)
    try:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values: int = 2 * config["num_hidden_layers"] * kv_heads * head_dim
    except KeyError as error:
        raise ValueError(f"model {model}: its config.json has no {error.args[0]}") from None
    return values * DTYPE_BYTES[dtype]


def random_prompts(model: Path, count: int, length: int, seed: int) -> list[Tokens]:
    """Token ids without meaning: only their number matters to the speed of an engine."""
    generator = random.Random(seed)
    vocabulary = decoder_config(model)["vocab_size"]
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
