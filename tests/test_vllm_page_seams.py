"""Managers, pools and specs of pages, packed ones too: what we rely on inside vLLM, by name."""

from __future__ import annotations

import dataclasses
import inspect

import engines  # noqa: F401  vLLM's environment
import pytest
from signatures import begins_with, has_fields, parameters, takes

# ---- managers


@pytest.mark.parametrize("number", [0, 1, 2])
def test_manager_methods_that_we_override(number):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    from paged_kv.vllm.scheduler.restoring import RestoringManager

    manager = RestoringManager.__mro__[number]  # then ShrinkingManager, PagedManager
    assert manager.__module__.startswith("paged_kv.")
    for name, theirs in vars(SingleTypeKVCacheManager).items():
        ours = vars(manager).get(name)
        theirs, ours = getattr(theirs, "__func__", theirs), getattr(ours, "__func__", ours)
        if not inspect.isfunction(ours) or name.startswith("__"):
            continue
        signature = inspect.signature(ours)
        kinds = {p.kind for p in signature.parameters.values()}
        named = [p for p in signature.parameters if p not in ("args", "kwargs")]
        missing = set(named) - set(parameters(theirs))
        assert not missing, f"{name} no longer takes {missing}"
        if not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
            assert parameters(theirs) == named, f"{name} now takes {parameters(theirs)}"


def test_manager_internals():
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager as Manager

    begins_with(Manager._apply_cow, "self", "request_id", "block_idx", "source_block", "cow_block")
    begins_with(Manager._remove_blocks_in_range, "self", "request_id", "first_block", "last_block")
    source = inspect.getsource(Manager)
    for name in ("req_to_blocks", "num_cached_block", "block_pool", "block_size"):
        assert f"self.{name}" in source, f"SingleTypeKVCacheManager has no {name}"
    takes(Manager.get_num_blocks_to_allocate, "apply_admission_cap", "new_computed_blocks")


def test_pools_and_coordinators():
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes

    begins_with(BlockPool.get_new_blocks, "self", "num_blocks")
    begins_with(BlockPool.get_cached_block, "self", "block_hash", "kv_cache_group_ids")
    begins_with(BlockPool.evict_blocks, "self", "block_ids")
    begins_with(KVCacheCoordinator.find_longest_cache_hit, "self", "block_hashes")
    begins_with(KVCacheManager.create_kv_cache_blocks, "self", "blocks")
    begins_with(resolve_block_hashes, "block_hashes", "hash_block_size")
    has_fields(KVCacheBlock, "block_id", "ref_cnt")
    assert isinstance(KVCacheBlock.block_hash, property)


# ---- specs


def test_specs():
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

    assert issubclass(FullAttentionSpec, AttentionSpec)
    assert issubclass(AttentionSpec, KVCacheSpec)
    begins_with(KVCacheSpec.max_memory_usage_bytes, "self", "vllm_config")
    begins_with(KVCacheSpec.is_uniform_with_collection, "self", "kv_cache_specs")
    begins_with(KVCacheSpec.merge, "specs")
    begins_with(KVCacheSpec.copy_with_new_block_size, "self", "block_size")


def test_registry_of_specs():
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from paged_kv.vllm.scheduler import registration, spec
    from paged_kv.vllm.scheduler.restoring import RestoringManager

    takes(
        KVCacheSpecRegistry.register, "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"
    )
    registration.register()
    registration.register()
    manager_of = KVCacheSpecRegistry.get_manager_class
    kwargs = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": "float32"}
    stock = FullAttentionSpec(**kwargs)
    assert manager_of(stock).__name__ == "FullAttentionManager"
    assert manager_of(spec.PagedSpec.from_full(stock, None)) is RestoringManager


def test_vllm_counts_the_bytes_that_a_spec_says():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from paged_kv.vllm.worker.packed import layout_of, packed_spec

    stock = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    for name in ("native", "int8", "int4", "fp8"):
        layout = layout_of(stock, name)
        assert packed_spec(stock, name).page_size_bytes == 3 * layout.block_bytes


def test_layers_with_other_pages_are_one_group_with_as_many_pages():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    from paged_kv.core.schedule import Schedule
    from paged_kv.vllm.scheduler import registration, spec
    from paged_kv.vllm.worker.packed import packed_spec

    registration.register()
    stock = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    full = {name: packed_spec(stock, name) for name in ("int8", "int4", "native")}
    paged = {n: spec.PagedSpec.from_full(s, Schedule(32, 128)) for n, s in full.items()}
    for specs in (full, paged):
        together = UniformTypeKVCacheSpecs.from_specs(specs)
        assert together is not None
        assert together.page_size_bytes == sum(s.page_size_bytes for s in specs.values())
    other = dataclasses.replace(paged["int4"], schedule=Schedule(32, 160))
    assert UniformTypeKVCacheSpecs.from_specs(paged | {"int4": other}) is None


def test_cache_dtypes_that_vllm_knows():
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs

    from paged_kv.vllm.frontend.formats import AUTO, CACHE_DTYPES, FP8_DTYPES

    assert {AUTO, *CACHE_DTYPES, *FP8_DTYPES} <= set(get_args(CacheDType))
    has_fields(EngineArgs, "kv_cache_dtype", "kv_cache_dtype_skip_layers")
