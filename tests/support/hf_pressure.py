"""Caches under pressure, and the reference engine that is told when each row began to shrink."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import NEVER
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, PagePool

PROMPT, END = 150, 250
Tensor = torch.Tensor


def tokens_of(seed: int, count: int = END) -> list[int]:
    """All different, so that no two entries are alike and tie."""
    return (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) + 3).tolist()


def waiting(model: Any, pool: PagePool, **options: Any) -> PagedCache:
    """A cache with start=pressure in a pool."""
    return PagedCache(model.config, pool=pool, start="pressure", **options)


@torch.inference_mode()
def feed(model: Any, cache: PagedCache, *rows: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """[rows, tokens, vocabulary]: one forward pass over the next tokens of each row."""
    logits: Tensor = model(torch.tensor(rows), past_key_values=cache, attention_mask=mask).logits
    return logits


def one_by_one(model: Any, cache: PagedCache, *rows: Sequence[int]) -> Tensor:
    """[rows, tokens, vocabulary]: a forward pass for each token."""
    return torch.cat([feed(model, cache, *([t] for t in step)) for step in zip(*rows)], 1)  # noqa: B905


def told(
    model: Any, options: dict[str, Any], page_size: int, start: int, chunks: Iterable[list[int]]
) -> Tensor:
    """[tokens, vocabulary] of the reference engine, which is held to its budget from start on."""
    config = CompressionConfig.from_dict(options)
    engine = ReferenceEngine(model, config, page_size, start)
    return torch.cat([engine.logits(engine.process(chunk)) for chunk in chunks])


def start_of(cache: PagedCache, row: int = 0) -> int:
    """Tokens at which a row shrank; NEVER."""
    return int(cache.sequences.starts[row])


def has_shrunk(cache: PagedCache) -> list[bool]:
    """Of each row."""
    return [start < NEVER for start in cache.sequences.starts.tolist()]
