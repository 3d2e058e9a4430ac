"""What we rely on inside vLLM, name by name: what fails here has moved and needs new code.

Where vLLM carries one of our source patches, the hook it adds is used and these still hold.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from typing import Any

import engines  # noqa: F401  vLLM's environment
import pytest
import tiny_models

from paged_kv.vllm.frontend import compat


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def begins_with(function: Any, *names: str) -> None:
    """Its first parameters."""
    found = parameters(function)[: len(names)]
    assert found == list(names), f"{function.__qualname__} now takes {parameters(function)}"


def takes(function: Any, *names: str) -> None:
    """Some of its parameters."""
    missing = set(names) - set(parameters(function))
    assert not missing, f"{function.__qualname__} no longer takes {missing}"


def has_fields(cls: type, *names: str) -> None:
    missing = set(names) - {field.name for field in dataclasses.fields(cls)}
    assert not missing, f"{cls.__name__} no longer has {missing}"


# ---- versions


def test_the_installed_version_is_one_we_tested():
    compat.check_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    expected = rf"paged_kv was tested with vLLM 0\.32, 0\.33; this is {re.escape(version)}\."
    with pytest.raises(ValueError, match=expected) as error:
        compat.check_version()
    assert "PAGED_KV_ALLOW_UNTESTED=1" in str(error.value)
    assert "VLLM_PLUGINS=" in str(error.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.1rc1", "0.33.0"])
def test_these_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()


# ---- options


def test_engine_args():
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    assert isinstance(inspect.getattr_static(EngineArgs, "add_cli_args"), staticmethod)
    begins_with(EngineArgs.add_cli_args, "parser")
    begins_with(EngineArgs.create_engine_config, "self", "usage_context", "headless")
    assert "EngineArgs.add_cli_args(" in inspect.getsource(AsyncEngineArgs.add_cli_args)
    assert AsyncEngineArgs.create_engine_config is EngineArgs.create_engine_config
    has_fields(EngineArgs, "additional_config", "block_size", "model", "load_format")
    has_fields(EngineArgs, "enable_dbo", "ubatch_size", "prefill_context_parallel_size")


def test_llm_makes_its_engine_args_from_fields():
    """options._CommandLine travels in additional_config because of it."""
    from vllm import LLM

    source = inspect.getsource(LLM.from_engine_args)
    assert "**vars(engine_args)" in source or "additional_config" in source


def test_requests_are_checked_in_the_front_end():
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    begins_with(InputProcessor.process_inputs, "self", "request_id", "prompt", "params")
    assert {"prompt_token_ids", "prompt_embeds", "resumable"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert "self.vllm_config = vllm_config" in inspect.getsource(InputProcessor.__init__)


def test_every_front_end_knows_the_pages_of_its_engines():
    """intake._pages_of_an_engine: their sum, and how many they are."""
    from vllm.v1.engine.core_client import MPClient

    ready = inspect.getsource(MPClient._apply_ready_response)
    assert "num_gpu_blocks += response.num_gpu_blocks" in ready
    source = " ".join(inspect.getsource(MPClient.__init__).split())
    assert "offline_mode = parallel_config.data_parallel_rank_local is not None" in source
    assert "dp_local_size if parallel_config.local_engines_only else dp_size" in source
    assert "[dp_rank] if offline_mode else list(range(dp_rank, dp_rank + num_ranks))" in source


def test_an_error_can_be_sent_in_place_of_an_answer():
    """RefusingMixin."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request, RequestStatus

    assert "self.has_finished_requests()" in inspect.getsource(Scheduler.has_requests)
    assert "self.scheduler.has_requests()" in inspect.getsource(EngineCore.step)
    assert RequestStatus.get_finished_reason(RequestStatus.FINISHED_ERROR) == FinishReason.ERROR
    takes(Request.__init__, "client_index", "request_id")
    assert EngineCoreOutput.__struct_fields__[:2] == ("request_id", "new_token_ids")
    assert {"outputs", "finished_requests"} <= set(EngineCoreOutputs.__struct_fields__)


# ---- scheduler


def test_scheduler_methods():
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert issubclass(AsyncScheduler, Scheduler)
    begins_with(Scheduler.add_request, "self", "request")
    begins_with(Scheduler._free_blocks, "self", "request")
    begins_with(Scheduler._get_local_prefix_cache_hit, "self", "request")
    begins_with(
        Scheduler._mamba_block_aligned_split,
        "self",
        "request",
        "num_new_tokens",
        "num_new_local_computed_tokens",
        "num_external_computed_tokens",
    )
    for name in ("_free_blocks", "_get_local_prefix_cache_hit", "_mamba_block_aligned_split"):
        assert name not in vars(AsyncScheduler), f"AsyncScheduler now has a {name} of its own"


def test_both_branches_of_schedule_let_us_clip_a_chunk():
    """Running and waiting requests, in both before pages are allocated."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    hook = "self._clip_chunk(" if hasattr(Scheduler, "_clip_chunk") else None
    if hook is None:
        hook = "self._mamba_block_aligned_split("
        assert source.count("if self.need_mamba_block_aligned_split:") == 2
    clips = [at for at in range(len(source)) if source.startswith(hook, at)]
    allocations = [
        at for at in range(len(source)) if source.startswith("kv_cache_manager.allocate_slots", at)
    ]
    assert len(clips) == 2
    assert len(allocations) >= 2
    assert clips[0] < allocations[0] < clips[1] < allocations[1]


def test_mamba_is_all_that_the_flag_means():
    """After __init__ nothing else reads it: we set it at the end of ours."""
    from vllm.v1.core.sched.scheduler import Scheduler

    readers = {
        name
        for name, function in vars(Scheduler).items()
        if inspect.isfunction(function)
        and "need_mamba_block_aligned_split" in inspect.getsource(function)
    }
    assert readers - {"_clip_chunk"} <= {"__init__", "schedule"}


# ---- managers


def test_manager_methods_that_we_override():
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    from paged_kv.vllm.scheduler.manager import PagedManager

    for name, theirs in vars(SingleTypeKVCacheManager).items():
        ours = vars(PagedManager).get(name)
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

    from paged_kv.vllm.scheduler import spec
    from paged_kv.vllm.scheduler.manager import PagedManager

    takes(
        KVCacheSpecRegistry.register, "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"
    )
    spec.register()
    spec.register()
    manager_of = KVCacheSpecRegistry.get_manager_class
    kwargs = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": "float32"}
    stock = FullAttentionSpec(**kwargs)
    assert manager_of(stock).__name__ == "FullAttentionManager"
    assert manager_of(spec.PagedSpec.from_full(stock, None)) is PagedManager


# ---- workers


def test_builders_are_made_by_groups_from_the_layers_backend():
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionMetadataBuilder, subclass_attention_backend
    from vllm.v1.worker.utils import AttentionGroup

    source = inspect.getsource(AttentionGroup.create_metadata_builders)
    assert "self.backend.get_builder_cls()" in source
    begins_with(
        AttentionMetadataBuilder.__init__,
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    )
    begins_with(AttentionMetadataBuilder.build, "self", "common_prefix_len", "common_attn_metadata")
    takes(AttentionMetadataBuilder.get_cudagraph_support, "vllm_config", "kv_cache_spec")
    assert AttentionMetadataBuilder.supports_update_block_table is False
    takes(subclass_attention_backend, "name_prefix", "attention_backend_cls", "builder_cls")
    assert "return self.attn_backend" in inspect.getsource(Attention.get_attn_backend)


def test_attention_metadata():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    has_fields(
        CommonAttentionMetadata,
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "max_seq_len",
        "block_table_tensor",
        "req_idx",
        "_num_computed_tokens_cache",
    )
    assert callable(CommonAttentionMetadata.replace)


def test_runners_know_prompt_lengths():
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.gpu_input_batch import InputBatch

    assert "self.num_prompt_tokens = " in inspect.getsource(InputBatch.__init__)
    assert "self.prompt_len = UvaBackedTensor(" in inspect.getsource(RequestState.__init__)
    from vllm.v1.worker.gpu.model_states import default

    assert "req_idx=input_batch.idx_mapping_np" in inspect.getsource(default)


@pytest.mark.parametrize("name", ["cpu_worker.CPUWorker", "gpu_worker.Worker"])
def test_worker_methods(name):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker = resolve_obj_by_qualname(f"vllm.v1.worker.{name}")
    begins_with(worker.load_model, "self")
    begins_with(worker.get_kv_cache_spec, "self")
    begins_with(worker.initialize_from_config, "self", "kv_cache_config")
    begins_with(worker.execute_model, "self", "scheduler_output")


def test_the_cpu_kernel_writes_pages_where_we_probe():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    begins_with(
        CPUAttentionBackendImpl.do_kv_cache_update,
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    )


# ---- packed pages: the layer's impl, its spec and its cache


def test_attention_calls_the_impl_as_we_stand_in_for_it():
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    names = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    begins_with(CPUAttentionBackendImpl.forward, "self", *names)
    assert "self.impl.forward(" in inspect.getsource(attention.unified_attention_with_output)
    source = inspect.getsource(attention.unified_kv_cache_update)
    assert "attn_layer.impl.do_kv_cache_update(" in source
    assert CPUAttentionBackend.forward_includes_kv_cache_update is False
    for name in ("scale", "logits_soft_cap", "sinks"):
        assert f"self.{name} = " in inspect.getsource(CPUAttentionBackendImpl.__init__)


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
    from paged_kv.vllm.scheduler import spec
    from paged_kv.vllm.worker.packed import packed_spec

    spec.register()
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


# ---- nothing happens without being asked


UNTOUCHED = """
import pkgutil, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as specs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.scheduler import Scheduler

def state():
    classes = (EngineArgs, InputProcessor, Attention, Scheduler)
    return [dict(vars(cls)) for cls in classes] + [dict(specs)]

before = state()
import paged_kv, paged_kv.vllm
for module in pkgutil.walk_packages(paged_kv.vllm.__path__, "paged_kv.vllm."):
    __import__(module.name)
assert state() == before, "an import has changed vLLM"

from paged_kv.vllm.frontend import plugin
plugin.register()
once = state()
assert once != before
plugin.register()
assert state() == once, "register() is not idempotent"
assert once[1:4] == before[1:4], "without a policy only EngineArgs is wrapped"
"""

CONFIG = """
import dataclasses, json, sys
from vllm import EngineArgs
config = EngineArgs(sys.argv[1], skip_tokenizer_init=True).create_engine_config()
print(json.dumps({
    "worker_cls": config.parallel_config.worker_cls,
    "scheduler_cls": config.scheduler_config.scheduler_cls,
    "block_size": config.cache_config.block_size,
    "additional_config": config.additional_config,
    "hash": config.compute_hash(),
    "wrapped": hasattr(EngineArgs, "_paged_kv_wrapped") or hasattr(EngineArgs, "plugins"),
}))
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    line = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.vllm
def test_importing_changes_nothing_and_registering_twice_is_once():
    run(UNTOUCHED, VLLM_PLUGINS="")


@pytest.mark.vllm
def test_without_a_policy_the_configuration_is_vllms(tmp_path):
    model = tiny_models.config_only("llama", tmp_path)
    without, with_plugin = (
        json.loads(run(CONFIG, model, VLLM_PLUGINS=names).splitlines()[-1])
        for names in ("", "paged_kv")
    )
    assert (without.pop("wrapped"), with_plugin.pop("wrapped")) == (False, True)
    assert with_plugin == without
