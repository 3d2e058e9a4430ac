"""What users pass to the caches, read and refused."""

from __future__ import annotations

from typing import Any

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.hf.pool import PagePool

FORMATS = ("native",)


def read_options(
    policy: str | CompressionConfig | None, budget: int | float | None, options: dict[str, Any]
) -> CompressionConfig:
    """What the arguments, the environment and the defaults come to. Raises ValueError."""
    if not isinstance(policy, CompressionConfig):
        return CompressionConfig.from_env(policy=policy, budget=budget, **options)
    if budget is not None or options:
        given = sorted(options | ({} if budget is None else {"budget": budget}))
        raise ValueError(f"policy is a CompressionConfig: {', '.join(given)} must be in it")
    return policy


def read_pool(pool: PagePool | None, page_size: int | None) -> PagePool:
    """The pool, or a new one without a limit. Raises ValueError: page_size is not the pool's."""
    if pool is None:
        return PagePool(page_size=DEFAULT_PAGE_SIZE if page_size is None else page_size)
    if page_size not in (None, pool.page_size):
        raise ValueError(f"page_size {page_size} differs from the pool's, {pool.page_size}")
    return pool


def check_page_format(name: str) -> None:
    """Raises ValueError unless pages can store numbers in this way."""
    if name not in FORMATS:
        raise ValueError(f"page_format must be one of {', '.join(FORMATS)}, not {name!r}")
