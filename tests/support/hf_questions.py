"""One document, many questions: for tests of copies, saved caches and crop."""

from __future__ import annotations

from typing import Any

import query_files
import torch
from hf_models import prompt

from paged_kv.hf import PagedCache

CONTEXT = prompt(203)
QUESTIONS = [prompt(9 + 20 * seed, seed + 1) for seed in range(3)]

OF_LLAMA = query_files.shared(4, 2, 2, 16)  # hf_models' "llama"
CALIBRATED = {"policy": "calibrated_attention", "budget": 96, "compress_prefill": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "positions": {"policy": "streaming", "budget": 96, "compress_prefill": True},
    "queries": {"policy": "snapkv", "budget": 96, "compress_prefill": True},
    "late": {"policy": "pyramidal+snapkv", "budget": 96},
    "scores": {"policy": "h2o", "budget": 96, "compress_prefill": True},
    "ratings": {**CALIBRATED, "statistics": OF_LLAMA, "fading": "on"},
    "gathered": CALIBRATED,
    "fraction": {"policy": "tova", "budget": 0.5, "min_budget": 80},
    "merging": {"policy": "value_merge", "budget": 96, "compress_prefill": True},
    "spill": {
        "policy": "snapkv",
        "budget": 96,
        "compress_prefill": True,
        "spill": True,
        "spill_interval": 0,
    },
    "int8": {"policy": "lru", "budget": 96, "page_format": "int8", "compress_prefill": True},
    "int4 full": {"page_format": "int4", "residual_pages": 1},
    "int4": {
        "policy": "snapkv",
        "budget": 96,
        "page_format": "int4",
        "residual_pages": 1,
        "compress_prefill": True,
    },
}


def read(model: Any, cache: Any, *rows: list[int]) -> None:
    """The context: in two chunks, so that a policy drops some of it if it may."""
    ids = torch.tensor(rows or [CONTEXT])
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        model(ids[:, 150:], past_key_values=cache)


def ask(model: Any, cache: Any, question: list[int], count: int = 45) -> list[int]:
    """A greedy answer."""
    ids = torch.tensor([CONTEXT + question])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    found = model.generate(ids, past_key_values=cache, max_new_tokens=count, **options)
    return found[0, ids.shape[1] :].tolist()


def logits(model: Any, cache: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], of one token after the other."""
    with torch.no_grad():
        steps = torch.tensor([tokens]).split(1, 1)
        return torch.cat([model(step, past_key_values=cache).logits[0] for step in steps])


_ANSWERS: dict[tuple[int, str], list[list[int]]] = {}


def answers(model: Any, options: dict[str, Any]) -> list[list[int]]:
    """Of caches that have seen nothing but the context and one question; found once."""
    key = id(model), str(options)  # hf_models keeps its models
    if key not in _ANSWERS:
        found = []
        for question in QUESTIONS:
            with PagedCache(model.config, **options) as cache:
                read(model, cache)
                found.append(ask(model, cache, question))
        _ANSWERS[key] = found
    return _ANSWERS[key]
