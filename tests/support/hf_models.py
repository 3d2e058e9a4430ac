"""Tiny random models for tests of the transformers fallback: one function, one table by name.

Like tiny_models, but smaller and never written to disk: vLLM's least head size does not matter.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from tiny_models import VOCAB_SIZE

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EVERY_HEAD = {**_SIZES, "num_key_value_heads": 4}
_HYBRID = {
    **_SIZES,
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_HEAD_DIM = {key: value for key, value in _SIZES.items() if key != "head_dim"}

# The decoder families that must work: name -> (model_type, config).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen2": ("qwen2", _NO_HEAD_DIM),
    "qwen3": ("qwen3", _SIZES),
    "mistral": ("mistral", {**_SIZES, "sliding_window": None}),
    "phi3": ("phi3", {**_NO_HEAD_DIM, "sliding_window": None}),
    "gemma2": ("gemma2", {**_HYBRID, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}),
    "gemma3": ("gemma3_text", {**_HYBRID, "query_pre_attn_scalar": 16}),
    "olmo2": ("olmo2", _NO_HEAD_DIM),
    "granite": ("granite", {**_NO_HEAD_DIM, "attention_multiplier": 0.3}),
    "cohere2": ("cohere2", _HYBRID),
    "smollm3": ("smollm3", {**_NO_HEAD_DIM, "no_rope_layers": [1, 0, 1, 1]}),
    "gpt_neox": ("gpt_neox", {**_NO_HEAD_DIM, "rotary_pct": 0.5}),
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", {**_NO_HEAD_DIM, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_oss": ("gpt_oss", {**_HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-every-head": ("llama", _EVERY_HEAD),
    "gpt2-scales": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "llama-draft": ("llama", {**_SIZES, "num_hidden_layers": 1}),
    "mistral-sliding": ("mistral", {**_SIZES, "sliding_window": 48}),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    ),
    "jamba": (
        "jamba",
        {
            **_NO_HEAD_DIM,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_SIZES,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gemma3n": (
        "gemma3n_text",
        {
            **_HYBRID,
            "intermediate_size": [96] * 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
        },
    ),
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "t5",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 3,
            "num_heads": 4,
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "bart": (
        "bart",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": None,
        },
    ),
}


EAGER = {"gemma2", "gpt_oss", "mamba", "bloom"}  # sdpa knows no softcap and no sinks


@cache
def _weights(name: str, attention: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model_type, values = (FAMILIES | OTHERS | ENCODER_DECODERS)[name]
    attention = "eager" if name in EAGER else attention
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            _spread(key, weight)
    model.generation_config.eos_token_id = None  # as many tokens as were asked for
    return model.to(dtype)


def _spread(name: str, weight: Any) -> None:
    """Weights that make tokens depend on the context, and attention heads differ."""
    if "relative_attention_bias" in name or name.endswith("sinks"):
        weight.normal_(0, 1.0)
    elif weight.dim() > 1:
        weight.normal_(0, 0.5 if "embed" in name or "wte" in name else 2 / weight.shape[-1] ** 0.5)


def load(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A model, always the same object; whoever changes it changes it back."""
    return _weights(name, attention, dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids without special ones."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, longest] of prompts, padded on a side."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, tokens in enumerate(prompts):
        own = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, own], mask[row, own] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def seen_under_streaming(
    total: int, prompt_len: int, budget: int, page_size: int = 16, sinks: int = 4
) -> torch.Tensor:
    """bool [total, total]: what each token sees of the others under the policy "streaming".

    The definition: a dense model with this mask is what the cache must equal.
    """
    queries, keys = torch.arange(total)[:, None], torch.arange(total)
    evicted = (queries - budget).clamp(min=0) // page_size * page_size
    evicted = evicted.masked_fill(queries < prompt_len, 0)
    return (keys <= queries) & ((keys < sinks) | (keys >= sinks + evicted))
