"""What a model's weights take, counted from its config.json for the usual dense decoders."""

from __future__ import annotations

from typing import Any

from paged_kv.capacity.model import Model
from paged_kv.core.schedule import cdiv
from paged_kv.model_rules import DTYPE_BYTES

WEIGHT_BYTES = {
    "fp32": 4.0, "float32": 4.0, "bf16": 2.0, "bfloat16": 2.0, "fp16": 2.0, "float16": 2.0,
    "fp8": 1.0, "int8": 1.0, "int4": 0.5,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ATTENTION_BIAS = ("llama", "qwen3", "smollm3")  # families that can have such
MLP_BIAS = ("llama", "smollm3")
_VOCAB_MULTIPLE = 64  # vLLM's rows of an embedding, on all ranks together


def weight_bytes(model: Model, dtype: str, num_ranks: int = 1) -> int:
    """Of one rank. Embeddings, output layer and norms are never quantized; scales not counted.

    Args:
        model: of a family in FAMILIES.
        dtype: of the linear layers, a key of WEIGHT_BYTES.
        num_ranks: that share them (tensor parallelism).

    Raises:
        ValueError: another family.
    """
    linear, others = parameters(model, num_ranks)
    size = WEIGHT_BYTES[dtype]
    return int(linear * size + others * max(size, DTYPE_BYTES["bfloat16"]))


def parameters(model: Model, num_ranks: int = 1, vocab_multiple: int = _VOCAB_MULTIPLE) -> Any:
    """(those of linear layers, the others) of one rank.

    Args:
        model: of a family in FAMILIES.
        num_ranks: that share them.
        vocab_multiple: what the rows of embeddings are rounded up to.
    """
    text, kind = model.text, model.text.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"model {model.name}: the weights of a {kind} are not counted (only of "
            f"{', '.join(FAMILIES)}): use --memory, with what is left for the KV cache"
        )
    hidden, inner = _size(model, "hidden_size"), _size(model, "intermediate_size")
    queries = model.num_heads // num_ranks * model.head_dim
    keys = max(1, model.kv_heads // num_ranks) * model.head_dim
    linear = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner // num_ranks
    others = 2 * hidden
    if kind == "qwen2":
        others += queries + 2 * keys
    if kind in ATTENTION_BIAS and getattr(text, "attention_bias", False):
        others += queries + 2 * keys + hidden
    if kind in MLP_BIAS and getattr(text, "mlp_bias", False):
        others += 2 * inner // num_ranks + hidden
    if kind == "qwen3":
        others += 2 * model.head_dim
    rows = cdiv(_size(model, "vocab_size"), vocab_multiple) * vocab_multiple
    tied = getattr(text, "tie_word_embeddings", kind == "smollm3")
    embeddings = cdiv(rows, num_ranks) * hidden * (1 if tied else 2)
    return model.num_layers * linear, model.num_layers * others + embeddings + hidden


def _size(model: Model, key: str) -> int:
    value = getattr(model.text, key, None)
    if not isinstance(value, int):
        raise ValueError(f"model {model.name}: its config.json has no {key}")
    return value
