"""vLLM engines with tiers for swapped requests; at their end nothing is held anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engines import block_pool, engine, scheduler, worker

GIB = 1 << 30


@contextmanager
def swapping(model: str, policy: dict[str, Any], num_pages: int = 400, **kw: Any) -> Iterator[Any]:
    settings = {"swap_space": 0.1, **policy}
    pool = {"num_gpu_blocks_override": num_pages, "kv_cache_memory_bytes": 256 << 20}
    more = {"block_size": 32, "max_model_len": 1024, **pool, **kw}
    with engine(model, settings, **more) as llm:
        yield llm
        check_empty(llm)


def check_empty(llm: Any) -> None:
    """Nobody holds a page, or a slot of a tier."""
    connector, pool = scheduler(llm).connector, block_pool(llm)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    if connector is None:
        return
    ledger = connector.ledger
    assert ledger.used == (0, 0)
    assert not ledger.swapped
    copier = swap(llm).copier
    assert not copier.ring_slots._first_tokens
    if copier.spilled is not None:
        llm.llm_engine.step()  # the worker is told who has ended
        assert not copier.spilled.stats().requests


def swap(llm: Any) -> Any:
    """The worker's side."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    assert worker(llm)
    return get_kv_transfer_group()
