"""Tiny random models, written by transformers: one function, one table of configs by name.

Head size 32 is the least that vLLM's CPU attention takes. `saved(name, path)` writes real weights;
`config_only(name, path)` one number in their place, for checks that run before weights are read.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

VOCAB_SIZE = 256

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HYBRID = {**_LLAMA, "sliding_window": 64}
_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
_MLA = {
    **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 6,
}

# name -> (model_type, architecture, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", _LLAMA),
    "llama-one-kv-head": ("llama", "LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 1}),
    "llama-30-layers": ("llama", "LlamaForCausalLM", {**_LLAMA, "num_hidden_layers": 30}),
    "llama-yarn": (
        "llama",
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "phi3-longrope": (
        "phi3",
        "Phi3ForCausalLM",
        {
            **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
            "pad_token_id": 0,
            "sliding_window": None,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + i / 8 for i in range(16)],
                "long_factor": [4.0 + i for i in range(16)],
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _LLAMA),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_HYBRID,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "mistral-sliding": ("mistral", "MistralForCausalLM", _HYBRID),
    "gemma3-all-sliding": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_HYBRID, "layer_types": ["sliding_attention"] * 6},
    ),
    "gemma3n": (
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            **_HYBRID,
            "intermediate_size": [128] * 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 6,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 8,
        },
    ),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2ForCausalLM", _MLA),
    "mamba": (
        "mamba",
        "MambaForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2},
    ),
    "jamba": (
        "jamba",
        "JambaForCausalLM",
        {
            **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "bert": ("bert", "BertModel", _ENCODER),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 80,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "bloom": (
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    ),
    "falcon-alibi": (
        "falcon",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
        },
    ),
    "llama4": (
        "llama4_text",
        "Llama4ForCausalLM",
        {
            **_LLAMA,
            "attention_chunk_size": 64,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
        },
    ),
}


def _config(name: str) -> Any:
    from transformers import AutoConfig

    model_type, architecture, values = MODELS[name]
    return AutoConfig.for_model(model_type, **values, architectures=[architecture], dtype="float32")


def config_only(name: str, path: Path) -> str:
    """A model directory whose weights are one number."""
    import torch
    from safetensors.torch import save_file

    directory = path / name
    directory.mkdir()
    _config(name).save_pretrained(directory)
    save_file({"number": torch.zeros(1)}, directory / "model.safetensors")
    return str(directory)


def saved(name: str, path: Path, tokenizer: bool = False) -> str:
    """A model directory with random weights (always the same) and, if asked for, a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    directory = path / name
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
    _spread(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(directory)
    if tokenizer:
        save_tokenizer(directory)
    return str(directory)


def _spread(model: Any) -> None:
    """Weights that make tokens depend on the context; tied embeddings would echo the last token."""
    import torch

    of_embedding = 0.02 if model.config.tie_word_embeddings else 0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, of_embedding if "embed" in name else 2 / weight.shape[-1] ** 0.5)


def save_tokenizer(directory: Path) -> None:
    """One token per word: "t0" to "t255"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(directory)


def write_text(file: Path, num_words: int) -> Path:
    """Random words that save_tokenizer's tokenizer knows; always the same."""
    import random

    rng = random.Random(1)
    # Not t10 or t200: t0, t1, t2 are special tokens, which are found inside words too.
    file.write_text(" ".join(f"t{rng.randrange(30, 100)}" for _ in range(num_words)))
    return file


def prompts_of(*lengths: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random tokens of these lengths; the first `shared` ones are the same in all."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, VOCAB_SIZE) for _ in range(shared)]
    return [
        prefix + [rng.randrange(3, VOCAB_SIZE) for _ in range(length - shared)]
        for length in lengths
    ]
