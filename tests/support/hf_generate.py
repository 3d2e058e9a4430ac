"""generate() of transformers with a PagedCache, for tests of what it can do with one."""

import torch

from paged_kv.hf import PagedCache

SNAPKV = {"policy": "snapkv", "budget": 80, "observation_window": 16}
STREAMING = {"policy": "streaming", "budget": 80}
NEW = 24


def cache_of(model, **options) -> PagedCache:
    return PagedCache(model.config, **{"page_size": 16} | options)


def generate(model, inputs, cache=None, **options) -> torch.Tensor:
    """All tokens; greedy unless told otherwise; sampling always from the same seed."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(**inputs, past_key_values=cache, **settings)


def one(tokens: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([tokens])}
