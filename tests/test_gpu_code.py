"""What runs on GPUs only, as far as it can be run without one: layouts, builders, the V2 runner.

Not here: FlashInfer's builder unless it is installed, kernels, streams, CUDA graphs.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import pytest
import torch
from gpu_steps import (
    AFTER,
    CASES,
    EVICTED_AFTER,
    EVICTED_BEFORE,
    LAYERS,
    RUNNERS,
    SINKS,
    SPEC,
    caches,
    entries,
    metadata,
    v1_runner,
)
from graph_steps import config

from paged_kv.policies.streaming import Streaming
from paged_kv.vllm.worker.attention import wrap_backend
from paged_kv.vllm.worker.block_table import RetainedTables
from paged_kv.vllm.worker.step import Compactor


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that the pages take the path of GPU backends."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("layout", "kernel_page_size"), CASES)
def test_compaction_in_every_layout(layout, kernel_page_size, runner):
    """Sinks and the newest entries are what a read finds after the step, in every layer."""
    make_runner, req_idx = RUNNERS[runner]
    views = caches(layout, kernel_page_size)
    layers = {
        name: SimpleNamespace(kv_cache=view.as_subclass(OnGpu))
        for name, view in zip(LAYERS, views, strict=True)
    }
    compactor = Compactor(make_runner(), Streaming(SINKS, 8), layers)
    step = metadata(kernel_page_size, req_idx)
    spec = SPEC.copy_with_new_block_size(kernel_page_size)
    table = step.block_table_tensor
    before = [[entries(view, table, row) for row in range(2)] for view in views]

    with compactor.step():
        assert compactor.begin_batch(spec, LAYERS, step).tolist() == EVICTED_BEFORE
    assert compactor.num_events == 2

    for view, rows in zip(views, before, strict=True):
        for row, entry in enumerate(rows):
            start, end = EVICTED_AFTER[row], AFTER[row]
            # The second sequence was compacted before: its sinks lie where its pages began.
            first = EVICTED_BEFORE[row]
            expected = torch.cat([entry[first : first + SINKS], entry[start + SINKS : end]])
            torch.testing.assert_close(entries(view, table, row)[start:end], expected)


def test_a_step_of_dummy_data_is_left_alone():
    """Profiling and graph capture build metadata outside of a step."""
    compactor = Compactor(None, Streaming(SINKS, 8), {})
    assert compactor.begin_batch(SPEC, LAYERS, metadata()).tolist() == [0, 0]


BACKENDS = {
    "flash_attn": "FlashAttentionBackend",
    "flashinfer": "FlashInferBackend",
    "triton_attn": "TritonAttentionBackend",
    "flex_attention": "FlexAttentionBackend",
    "rocm_attn": "RocmAttentionBackend",
    "rocm_aiter_fa": "AiterFlashAttentionBackend",
    "cpu_attn": "CPUAttentionBackend",
}


def backend(module: str) -> Any:
    try:
        loaded = importlib.import_module(f"vllm.v1.attention.backends.{module}")
    except ImportError as error:
        pytest.skip(f"{module}: {error}")
    return getattr(loaded, BACKENDS[module])


@pytest.mark.parametrize("module", BACKENDS)
def test_builders_get_shifted_metadata(monkeypatch, module):
    """The builder's own build needs its kernels: one that keeps what it gets takes its place."""
    stock = backend(module)
    compactor = Compactor(v1_runner(), Streaming(SINKS, 8), {})
    wrapped = wrap_backend(stock, compactor)
    assert issubclass(wrapped, stock)
    assert wrapped.get_impl_cls() is stock.get_impl_cls()

    builder_class = wrapped.get_builder_cls()
    assert issubclass(builder_class, stock.get_builder_cls())
    assert builder_class.supports_update_block_table is False

    seen = {}

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        seen.update(metadata=common_attn_metadata, fast_build=fast_build)
        return "built"

    monkeypatch.setattr(stock.get_builder_cls(), "build", build)
    builder = builder_class.__new__(builder_class)
    builder.kv_cache_spec, builder.layer_names = SPEC, LAYERS
    builder.vllm_config, builder._tables = config("NONE"), RetainedTables(4)
    step = metadata()
    monkeypatch.setattr(compactor, "_compact", lambda pending: None)
    with compactor.step():
        assert builder.build(0, step, fast_build=True) == "built"

    got = seen["metadata"]
    assert seen["fast_build"] is True
    assert got.seq_lens.tolist() == got.seq_lens_cpu_upper_bound.tolist() == [100, 64]
    assert got.max_seq_len == 100
    table = step.block_table_tensor
    assert got.block_table_tensor[0].tolist() == table[0].tolist()
    assert got.block_table_tensor[1, :4].tolist() == table[1, 1:5].tolist()
    assert step.seq_lens.tolist() == AFTER, "the groups share it"


def test_graphs_stay_piecewise_where_they_must():
    """vLLM's default on GPUs is FULL_AND_PIECEWISE; what shows its queries is in no full graph."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    def resolve(mode: CUDAGraphMode, compiled: CompilationMode) -> CUDAGraphMode:
        config = CompilationConfig(mode=compiled, cudagraph_mode=mode)
        config.splitting_ops = list(CompilationConfig._attention_ops)
        return config.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.NEVER, "PagedKV")

    compiled = CompilationMode.VLLM_COMPILE
    assert resolve(CUDAGraphMode.FULL_AND_PIECEWISE, compiled) is CUDAGraphMode.PIECEWISE
    assert resolve(CUDAGraphMode.FULL_DECODE_ONLY, compiled) is CUDAGraphMode.PIECEWISE
    assert resolve(CUDAGraphMode.PIECEWISE, compiled) is CUDAGraphMode.PIECEWISE
    assert resolve(CUDAGraphMode.FULL_AND_PIECEWISE, CompilationMode.NONE) is CUDAGraphMode.NONE
    with pytest.raises(ValueError, match="FULL is not supported"):
        resolve(CUDAGraphMode.FULL, compiled)


def test_the_gpu_worker_is_vllms_with_our_mixin():
    from vllm.v1.worker.gpu_worker import Worker

    from paged_kv.vllm.worker import worker

    assert worker.PagedGPUWorker.__mro__[1:3] == (worker.PagedWorkerMixin, Worker)
    assert worker.PagedGPUWorker is worker.PagedGPUWorker
    with pytest.raises(AttributeError, match="PagedTPUWorker"):
        worker.PagedTPUWorker  # noqa: B018


def test_asynchronous_scheduling_gets_the_asynchronous_scheduler():
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from paged_kv.config import CompressionConfig
    from paged_kv.vllm.frontend import options
    from paged_kv.vllm.scheduler.scheduler import PagedAsyncScheduler, PagedScheduler
    from paged_kv.vllm.swap.scheduler import SwapAsyncScheduler

    def installed(asynchronous: bool, **settings: Any) -> str:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(worker_cls="vllm.v1.worker.gpu_worker.Worker"),
            scheduler_config=SimpleNamespace(async_scheduling=asynchronous, scheduler_cls=None),
        )
        options._install_worker(config)
        options._install_scheduler(config, CompressionConfig.from_dict(settings))
        assert config.parallel_config.worker_cls == "paged_kv.vllm.worker.worker.PagedGPUWorker"
        return config.scheduler_config.scheduler_cls

    streaming = {"policy": "streaming"}
    assert installed(True, **streaming) == "paged_kv.vllm.scheduler.scheduler.PagedAsyncScheduler"
    assert installed(False, **streaming) == "paged_kv.vllm.scheduler.scheduler.PagedScheduler"
    assert installed(True, swap_space=1) == "paged_kv.vllm.swap.scheduler.SwapAsyncScheduler"
    assert installed(False, swap_space=1) == "paged_kv.vllm.swap.scheduler.SwapScheduler"
    assert issubclass(SwapAsyncScheduler, AsyncScheduler)
    assert issubclass(PagedAsyncScheduler, AsyncScheduler)
    assert issubclass(PagedScheduler, Scheduler)
    assert not issubclass(PagedScheduler, AsyncScheduler)
