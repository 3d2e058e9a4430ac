"""config.json files of published shapes, for checks that need no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
GEMMA_4B: dict[str, Any] = {  # the decoder of Gemma 3 4B, as transformers saves it
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "layer_types": [
        "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(34)
    ],
}


def write(directory: Path, config: dict[str, Any], **changed: Any) -> str:
    """A directory with this config; changed: keys with another value, None to leave one out."""
    values = {key: value for key, value in {**config, **changed}.items() if value is not None}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return str(directory)
