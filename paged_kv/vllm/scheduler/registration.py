"""Tells vLLM which manager allocates for our spec."""

from __future__ import annotations

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from paged_kv.vllm.scheduler.restoring import RestoringManager
from paged_kv.vllm.scheduler.spec import PagedSpec


def register() -> None:
    """In every process that allocates pages, or is told of specs. Idempotent."""
    # vLLM registers its own specs only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(PagedSpec, RestoringManager, uniform_type_base_spec=PagedSpec)
