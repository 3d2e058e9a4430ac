"""Around every step of a vLLM engine: no page that is cached or shared is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from engines import block_pool, engine_core, scheduler, worker


@dataclass
class Watch:
    """What a PageWatch saw."""

    num_compared: int = 0
    num_copies: int = 0
    num_events: int = 0


@contextmanager
def watched_pages(llm: Any) -> Iterator[Watch]:
    """Compares, around every step, the contents of all pages that are cached or shared."""
    watch = Watch()
    target, executor, pool = scheduler(llm), engine_core(llm).model_executor, block_pool(llm)
    caches = [layer.kv_cache for layer in worker(llm).compactor.layers.values()]
    schedule, execute = target.schedule, executor.execute_model
    before: dict[int, Any] = {}

    def protected() -> dict[int, Any]:
        blocks = [b for b in pool.blocks if b.block_hash is not None or b.ref_cnt > 1]
        return {b.block_id: b.block_hash for b in blocks if not b.is_null}

    def watching_schedule(*args: Any, **kwargs: Any) -> Any:
        before.clear()
        before.update(protected())
        output = schedule(*args, **kwargs)
        watch.num_copies += len(output.kv_cache_block_copies or ())
        return output

    def watching_execute(*args: Any, **kwargs: Any) -> Any:
        now = protected()
        pages = [p for p, block_hash in before.items() if p in now and now[p] == block_hash]
        snapshots = [cache[pages] for cache in caches]
        num_events = worker(llm).compactor.num_events
        result = execute(*args, **kwargs)
        for cache, snapshot in zip(caches, snapshots, strict=True):
            assert torch.equal(cache[pages], snapshot), "a cached or shared page was written"
        watch.num_compared += len(pages)
        watch.num_events += worker(llm).compactor.num_events - num_events
        return result

    target.schedule, executor.execute_model = watching_schedule, watching_execute
    try:
        yield watch
    finally:
        target.schedule, executor.execute_model = schedule, execute
