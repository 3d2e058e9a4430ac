"""vLLM engines for tests: in-process, float32, eager, a small pool. One starts in 3 to 40 s."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

Tokens = list[int]


@contextmanager
def without_collections() -> Iterator[None]:
    """vLLM collects garbage nine times in an engine's life: 0.4 s each with all that we import."""
    nothing = {name: lambda *_: 0 for name in ("collect", "freeze", "unfreeze")}
    with mock.patch.multiple(gc, **nothing):
        yield


@cache
def _look_through_everything_once() -> None:
    """At the end of the first engine: later ones do not look through what has been imported."""
    from vllm.platforms import current_platform

    gc.freeze()
    atexit.register(gc.unfreeze)
    # vLLM seeks Triton kernels to replace in all modules: 9 % of the time of such tests.
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


@contextmanager
def engine(model: str, paged_kv: dict[str, Any] | None = None, **kwargs: Any) -> Iterator[Any]:
    """An LLM; paged_kv as in additional_config. Everything is given back at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 512 << 20,
        "seed": 0,
        "additional_config": {"paged_kv": paged_kv} if paged_kv else {},
    }
    with without_collections():
        llm = LLM(model, **{**settings, **kwargs})
    try:
        yield llm
    finally:
        with without_collections():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()
        _look_through_everything_once()


@contextmanager
def logged(module: str) -> Iterator[list[str]]:
    """What a module of paged_kv logs, from level INFO on; vLLM's loggers tell pytest nothing."""
    import vllm.logger  # noqa: F401 (it sets up all loggers anew when it is imported)

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(f"vllm.paged_kv.{module}")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def kv_cache_planning() -> Any:
    """The module with vLLM's functions that make KV cache groups: vLLM 0.33 gave it a name."""
    try:
        return importlib.import_module("vllm.v1.core.kv_cache_planning")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.v1.core.kv_cache_utils")


def kv_cache_configs(vllm_config: Any, specs: list[Any], memory: list[int]) -> list[Any]:
    """What an engine makes of the specs of its ranks, before it allocates anything."""
    planning = kv_cache_planning()
    groups = []
    if hasattr(planning, "get_global_kv_cache_groups"):  # from vLLM 0.33 on a step of its own
        groups = [planning.get_global_kv_cache_groups(vllm_config, specs)]
    configs: list[Any] = planning.get_kv_cache_configs(vllm_config, specs, memory, *groups)
    return configs


def engine_core(llm: Any) -> Any:
    """The EngineCore: .scheduler, .model_executor, .step()."""
    return llm.llm_engine.engine_core.engine_core


def scheduler(llm: Any) -> Any:
    return engine_core(llm).scheduler


def block_pool(llm: Any) -> Any:
    return scheduler(llm).kv_cache_manager.block_pool


def worker(llm: Any) -> Any:
    return engine_core(llm).model_executor.driver_worker.worker


def complete(llm: Any, prompts: list[Tokens], max_tokens: int, **sampling: Any) -> list[Any]:
    """vLLM's output of each prompt, greedy unless told otherwise, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]


def generate(
    llm: Any, prompts: list[Tokens], max_tokens: int = 256, **sampling: Any
) -> list[Tokens]:
    """Greedy tokens of each prompt (token ids in, token ids out), all in one batch."""
    return [list(output.token_ids) for output in complete(llm, prompts, max_tokens, **sampling)]


@contextmanager
def recorded_chunks(llm: Any) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Records (start, end) of every chunk scheduled, by request id.

    A preempted request's chunks begin anew at its prefix hit: a start below the end before it.
    """
    chunks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    target = scheduler(llm)
    schedule = target.schedule

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            end = target.requests[request_id].num_computed_tokens
            chunks[request_id].append((end - num_tokens, end))
        return output

    target.schedule = recording
    try:
        yield chunks
    finally:
        del target.schedule
