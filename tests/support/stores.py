"""How a vLLM engine can store numbers in its pages: settings by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CHUNKS = {"max_num_batched_tokens": 100}  # prompts in chunks that end anywhere in a page
STORES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "int4": {"kv_cache_dtype": "int4_per_token_head"},
}


def skip_without_fp8(store: str) -> None:
    """Skips where a store (one of STORES, or a dtype of vLLM's cache) needs what is not here."""
    if store.startswith("fp8") and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's fp8 cache needs AVX-512")
