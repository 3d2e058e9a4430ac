"""What an engine in this process holds, counted by vLLM's block pool, our managers and the system.

The process's memory (on a GPU torch's) grows by all of the pool when an engine makes its tensors.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_kv.vllm.driver.workload import MemoryReport, RunResult, Workload

if TYPE_CHECKING:
    import torch


@contextmanager
def cache_allocation() -> Iterator[list[int]]:
    """While an engine starts: by how many bytes memory grows when its cache is made."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    grown: list[int] = []
    original = WorkerWrapperBase.initialize_from_config

    def measuring(self: Any, *args: Any, **kwargs: Any) -> None:
        before = _bytes_in_use()
        original(self, *args, **kwargs)
        grown.append(_bytes_in_use() - before)

    WorkerWrapperBase.initialize_from_config = measuring
    try:
        yield grown
    finally:
        WorkerWrapperBase.initialize_from_config = original


def measure(engine: Any, workload: Workload, single: Workload) -> MemoryReport:
    """Runs two workloads.

    Args:
        engine: an Engine, without a prefix cache.
        workload: that fills the pool.
        single: one request; counted before its last step, at all its tokens but two.
    """
    worker = engine.core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context
    result = _finish(engine, workload)
    counted = _single(engine, single)
    return MemoryReport(
        pool_pages=engine.core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        tensor_bytes=_num_bytes(layer.kv_cache for layer in layers.values()),
        beside_bytes=_beside_bytes(worker, layers),
        grown_bytes=engine.cache_bytes,
        **counted,
        peak_pages=result.peak_pages,
        peak_running=result.peak_running,
        seconds=result.seconds,
    )


def _finish(engine: Any, workload: Workload) -> RunResult:
    *_, result = engine.run(workload)
    assert isinstance(result, RunResult)
    return result


def _single(engine: Any, workload: Workload) -> dict[str, Any]:
    """Of a MemoryReport, what a single request holds after the last step but one."""
    scheduler = engine.core.scheduler
    pool, counted = scheduler.kv_cache_manager.block_pool, {}
    for _ in engine.steps(workload):
        for request_id, request in scheduler.requests.items():
            counted = {
                "num_tokens": request.num_computed_tokens,
                "held_pages": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                "held_groups": _by_group(scheduler, request_id, request.num_computed_tokens),
            }
    return counted


def _by_group(scheduler: Any, request_id: str, num_tokens: int) -> list[tuple[list[int], int, int]]:
    """(layers, entries, pages) of each layer group, as its page manager has them.

    Without a policy, entries are what the newest token saw: vLLM skips what is behind a window.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    found = []
    groups = scheduler.kv_cache_config.kv_cache_groups
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for group, manager in zip(groups, managers, strict=True):
        if hasattr(manager, "evicted"):
            evicted = manager.evicted(request_id, num_tokens)
        else:
            evicted = manager.get_num_skipped_tokens(num_tokens - 1)
        pages = sum(not block.is_null for block in manager.req_to_blocks[request_id])
        layers = sorted(map(extract_layer_index, group.layer_names))
        found.append((layers, num_tokens - evicted, pages))
    return found


def _beside_bytes(worker: Any, layers: dict[str, Any]) -> int:
    """Of a policy's tensors by slot, its query ring and the residual's."""
    from paged_kv.vllm.worker.caches import WorkerCaches

    compactor = getattr(worker, "compactor", None)
    residual = getattr(worker, "residual", None)
    rings = 0 if residual is None else residual.requests.num_rows * residual.row_bytes
    if compactor is None or compactor.positional:
        return rings
    if compactor.policy.observation_window:
        rings += compactor.requests.num_rows * compactor.observer.row_bytes
    caches = WorkerCaches(layers, worker.layouts, compactor)
    groups = worker.model_runner.kv_cache_config.kv_cache_groups
    side = [
        tensor
        for group in groups
        if group.layer_names[0] in compactor.layers
        for tensor in caches.side(tuple(group.layer_names))
    ]
    return rings + _num_bytes(side)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their memory, each piece once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _bytes_in_use() -> int:
    """Of torch on a GPU; else of this process: not a file's, nor what malloc keeps for later."""
    import torch  # not before engine_environment is set

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
