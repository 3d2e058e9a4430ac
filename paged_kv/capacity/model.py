"""A model's sizes, from its config.json; what our vLLM plugin refuses is refused here, too.

Fail closed: what this file cannot tell is an error, never a guess.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paged_kv.core.options import MOST
from paged_kv.model_rules import (
    DTYPE_BYTES,
    check_layer_types,
    full_attention_layers,
    refused_attention,
)

_LENGTHS = (  # keys that vLLM reads, the least counts
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_EXTENDED = (  # rope types whose max_position_embeddings is that of the longer context already
    "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling",
)  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_RECURRENT = (  # what keys begin with
    "mamba", "ssm_", "state_size", "linear_", "attn_layer_", "layers_block_type",
    "hybrid_override_pattern", "time_mix_", "short_conv_", "conv_L_cache",
)  # fmt: skip
_MM_PREFIX = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")  # vLLM's list
# Keys of models whose KV heads are not num_key_value_heads of head_dim in each layer.
_OTHER_SHAPES = (
    "attn_config", "attention_head_dim", "block_configs", "compress_ratios", "global_head_dim",
    "hidden_size_per_head", "multi_query", "multi_query_group_num", "n_head_kv",
    "num_attention_groups", "num_global_key_value_heads", "num_key_value_heads_per_layer",
    "num_kv_heads", "swa_head_dim", "swa_num_key_value_heads", "v_head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A decoder's sizes.

    Args:
        name: of its directory or file.
        directory: where its config.json is.
        text: the decoder's part of config.json, as attributes.
        num_layers: of all kinds.
        full_layers: those without a sliding window.
        window: tokens of the sliding window; 0 where no layer has one.
        num_heads: query heads.
        kv_heads: of each layer, on all ranks together.
        head_dim: of queries, keys and values.
        dtype: of keys and values, a key of DTYPE_BYTES.
        max_len: tokens of the longest sequence that vLLM takes; None: its config does not say.
    """

    name: str
    directory: Path
    text: SimpleNamespace
    num_layers: int
    full_layers: list[int]
    window: int
    num_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    max_len: int | None

    @property
    def num_sliding(self) -> int:
        """Layers with a sliding window."""
        return self.num_layers - len(self.full_layers)


def read_model(path: str, dtype: str = "auto") -> Model:
    """The model of a directory or of a config.json.

    Args:
        path: of either.
        dtype: a key of DTYPE_BYTES, or auto: the config's, as vLLM takes it.

    Raises:
        ValueError: it cannot be read, or is of a kind that is not supported; names the key.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model {path}: {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path}: {file} is not JSON: {error}") from None
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"model {path}: {file} is no config of a model")
    name = file.parent.resolve().name if file.name == "config.json" else file.stem
    where = f"model {name}"
    _refuse_kinds(where, config, text)
    sizes = _sizes(where, text)
    attributes = SimpleNamespace(**text)
    types = text.get("layer_types")
    if types is not None and len(types) != sizes["num_layers"]:
        raise ValueError(f"{where}: layer_types has {len(types)} layers, not {sizes['num_layers']}")
    full = full_attention_layers(attributes, sizes["num_layers"])
    has_window = len(full) < sizes["num_layers"]
    window = _positive(where, text, "sliding_window") if has_window else 0
    return Model(
        name,
        file.parent,
        attributes,
        full_layers=full,
        window=window,
        dtype=_dtype(where, config, text) if dtype == "auto" else dtype,
        max_len=_max_len(where, text),
        **sizes,
    )


def _refuse_kinds(where: str, config: dict[str, Any], text: dict[str, Any]) -> None:
    types = text.get("layer_types") or []
    if not isinstance(text.get("model_type"), str) or not isinstance(types, list):
        raise ValueError(f"{where}: its config.json has no model_type, or layer_types is no list")
    architectures = " ".join(map(str, config.get("architectures") or ["ForCausalLM"]))
    recurrent = any(key.startswith(_RECURRENT) for key in text) or bool(set(types) - _LAYER_TYPES)
    chunked = "chunked_attention" in types
    refused = {
        "an encoder-decoder model": bool(config.get("is_encoder_decoder"))
        or {"encoder_layers", "decoder_layers"} <= set(text),
        "a pooling model": not any(
            kind in architectures for kind in ("ForCausalLM", "ForConditionalGeneration", "LMHead")
        ),
        "multi-head latent attention (MLA)": text.get("kv_lora_rank") is not None,
        **refused_attention(SimpleNamespace(**text)),
        "a model with Mamba or linear-attention layers": recurrent and not chunked,
        "chunked local attention ": chunked,
        "bidirectional multimodal prefixes": bool(
            config.get("is_mm_prefix_lm", config.get("model_type") in _MM_PREFIX)
        ),
        "reference sliding-window attention": text.get("rswa_window") is not None,
    }
    for what, present in refused.items():
        if present:
            raise ValueError(f"{where}: paged_kv does not support {what.strip()}")
    for key in _OTHER_SHAPES:
        if text.get(key) not in (None, False):
            raise ValueError(
                f"{where}: its config.json has {key}, so its KV heads may not be "
                "num_key_value_heads of head_dim; read vLLM's own log for such a model"
            )
    check_layer_types(where, SimpleNamespace(**text))


def _sizes(where: str, text: dict[str, Any]) -> dict[str, int]:
    layers, heads = (
        _positive(where, text, key) for key in ("num_hidden_layers", "num_attention_heads")
    )
    kv_heads = heads
    if text.get("num_key_value_heads") is not None:
        kv_heads = _positive(where, text, "num_key_value_heads")
    if text.get("head_dim"):
        head_dim = _positive(where, text, "head_dim")
    else:
        head_dim = _positive(where, text, "hidden_size") // heads
    return {"num_layers": layers, "num_heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _max_len(where: str, text: dict[str, Any]) -> int | None:
    """As vLLM derives it for --max-model-len."""
    limits = [_positive(where, text, key) for key in _LENGTHS if text.get(key) is not None]
    if not limits:
        return None
    if text.get("model_max_length"):  # goes before the others (Command-R)
        limits = [text["model_max_length"]]
    return int(min(limits) * _rope_factor(where, text))


def _rope_factor(where: str, text: dict[str, Any]) -> float:
    """By which rope scaling extends max_position_embeddings."""
    rope, factor = text.get("rope_parameters") or text.get("rope_scaling"), 1.0
    if not isinstance(rope, dict) or "gemma3" in text["model_type"]:  # which counts it already
        return factor
    for each in (rope, *rope.values()):  # one, or one for each type of layers
        kind = isinstance(each, dict) and (each.get("rope_type") or each.get("type"))
        if kind and kind not in _EXTENDED:
            factor = factor if each.get("factor") is None else each["factor"]
    if not isinstance(factor, (int, float)) or not 0 < factor <= MOST:
        raise ValueError(
            f"{where}: factor of its rope scaling must be a number above 0, not {factor!r}"
        )
    return factor


def _positive(where: str, text: dict[str, Any], key: str) -> int:
    if text.get(key) is None:
        raise ValueError(
            f"{where}: its config.json has no {key}; load and save the config with transformers, "
            "which writes what it leaves out"
        )
    value = text[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be an integer >= 1, not {value!r}")
    return value


def _dtype(where: str, config: dict[str, Any], text: dict[str, Any]) -> str:
    """As vLLM decides by itself: float32 becomes bfloat16."""
    both = (part.get(key) for part in (text, config) for key in ("dtype", "torch_dtype"))
    found = next((str(value) for value in both if value), "float32").removeprefix("torch.")
    if found not in DTYPE_BYTES:
        raise ValueError(f"{where}: its config.json has dtype {found}: use --dtype to choose one")
    return "bfloat16" if found == "float32" else found
