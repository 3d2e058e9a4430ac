"""One vLLM engine inside this process, stepped by hand: what the demo and benchmarks run.

vLLM's own choice on CPU, three processes that talk by shared memory, costs more on two cores than
it gives: the front end, the scheduler and the worker wait for each other actively. In one process
all cores work for the model (see engine_environment).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from paged_kv.vllm.driver.memory import cache_allocation
from paged_kv.vllm.driver.workload import (
    EngineInfo,
    EngineSettings,
    RunResult,
    Step,
    Tokens,
    Workload,
)

MAX_BATCHED_TOKENS = 2048  # of a step


POOL_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # where it is set, vLLM ignores the bytes it is given


def engine_environment() -> dict[str, str]:
    """Environment of a process with an engine; to be set before torch is imported.

    GNU OpenMP's threads spin for a long time before they sleep. Whoever else wants one of the cores
    then stops all of them: one busy neighbour costs a factor of 10. With this count they sleep
    after some tens of microseconds, which costs a quiet machine nothing.
    """
    defaults = {
        "OMP_NUM_THREADS": str(usable_cores()),
        "GOMP_SPINCOUNT": "10000",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | {
        name: os.environ.get(name, value) for name, value in defaults.items()
    }


def usable_cores() -> int:
    """Cores that this process may use: a container can see more than its quota allows."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def ask_for_amx() -> None:
    """Lets this process use AMX, where the processor has it.

    Linux kills a process that uses AMX without asking. vLLM's attention in bfloat16 leaves the
    asking to oneDNN, which does it at a large enough product of matrices: a small model with a
    short prompt reaches attention before.
    """
    import torch

    torch.cpu._init_amx()


class _Recorder:
    """Takes the place of vLLM's stat loggers (vllm.v1.metrics.loggers.StatLoggerBase)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Begins a run."""
        self.start = time.perf_counter()
        self.steps: list[Step] = []
        self.prefix_queries = self.prefix_hits = self.computed = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        """Called by vLLM after each step."""
        prefix = scheduler_stats.prefix_cache_stats
        self.prefix_queries += prefix.queries
        self.prefix_hits += prefix.hits
        generated = prefilled = preempted = 0
        if iteration_stats is not None:
            generated = iteration_stats.num_generation_tokens
            prefilled = iteration_stats.num_prompt_tokens
            preempted = iteration_stats.num_preempted_reqs
        end = time.perf_counter() - self.start
        pages = round(scheduler_stats.kv_cache_usage * self.num_pages)
        running = scheduler_stats.num_running_reqs
        computed, self.computed = self.computed, 0
        self.steps.append(Step(end, generated, prefilled, running, pages, preempted, computed))

    def count_computed(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """A scheduler's schedule() that counts tokens: vLLM's statistics count prompts once."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.computed += output.total_num_scheduled_tokens
            return output

        return counting

    def log(self) -> None:
        """Nothing is printed."""


class Engine:
    """A running engine.

    Args:
        settings: see EngineSettings.
        more: arguments of vLLM's LLM; they come before ours.
    """

    def __init__(self, settings: EngineSettings, **more: Any) -> None:
        from vllm import LLM

        os.environ.pop(POOL_VARIABLE, None)
        ask_for_amx()
        start = time.perf_counter()
        arguments: dict[str, Any] = {
            "dtype": settings.dtype,
            "enforce_eager": True,
            "seed": 0,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "kv_cache_memory_bytes": settings.pool_bytes,
            "enable_prefix_caching": settings.prefix_caching,
            "kv_cache_dtype": settings.kv_cache_dtype,
            "disable_log_stats": False,
            "additional_config": {"paged_kv": dict(settings.policy)} if settings.policy else {},
        }
        if settings.block_size is not None:
            arguments["block_size"] = settings.block_size
        with cache_allocation() as allocated:
            self.llm = LLM(settings.model, **{**arguments, **more})
        self.cache_bytes = sum(allocated)  # of memory, by which it grew for the cache
        self.seconds = time.perf_counter() - start
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.recorder = _Recorder(self.info().num_pages)
        self.llm.llm_engine.logger_manager.stat_loggers = [self.recorder]
        scheduler = self.core.scheduler
        scheduler.schedule = self.recorder.count_computed(scheduler.schedule)
        self.num_requests = 0

    def close(self) -> None:
        """Gives everything back, for a process that starts another engine."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core
        gc.collect()
        cleanup_dist_env_and_memory()

    def info(self) -> EngineInfo:
        """Sizes of the pool."""
        scheduler = self.core.scheduler
        cache = self.llm.llm_engine.vllm_config.cache_config
        pool = scheduler.kv_cache_config
        page_bytes = max(
            len(group.layer_names) * group.kv_cache_spec.page_size_bytes
            for group in pool.kv_cache_groups
        )
        pages, decode = pool.num_blocks - 1, cache.kv_cache_max_concurrency
        if hasattr(scheduler, "paged_managers"):
            decode = pages / scheduler.capacity.pages_per_sequence()
        return EngineInfo(
            pages,
            page_bytes,
            cache.kv_cache_size_tokens,
            cache.kv_cache_max_concurrency,
            decode,
            self.seconds,
        )

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, in the model's chat template if it has one."""
        tokenizer = self.llm.get_tokenizer()
        if not tokenizer.chat_template:
            return [list(tokenizer.encode(text)) for text in texts]
        chats = [[{"role": "user", "content": text}] for text in texts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        return [list(tokenizer.encode(text, add_special_tokens=False)) for text in prompts]

    def steps(self, workload: Workload) -> Iterator[Step]:
        """Runs a workload; yields after each step. The outputs are in `outputs` at the end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        if workload.reset_prefix_cache:
            engine.reset_prefix_cache()
        params = SamplingParams(
            temperature=0.0,
            max_tokens=workload.output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        first = self.num_requests
        self.outputs: list[Tokens] = [[] for _ in workload.prompts]
        self.recorder.reset()
        for prompt in workload.prompts:
            engine.add_request(str(self.num_requests), {"prompt_token_ids": prompt}, params)
            self.num_requests += 1
        for step in count(1):
            if not engine.has_unfinished_requests():
                break
            if workload.preempt_every and step % workload.preempt_every == 0:
                engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                index = int(output.request_id) - first
                self.outputs[index] = list(output.outputs[0].token_ids)
            if self.recorder.steps:
                yield self.recorder.steps[-1]

    def run(self, workload: Workload) -> Iterator[int | RunResult]:
        """Runs a workload: yields output tokens so far after each step, then the result."""
        num_tokens, shrunk = 0, self._num_shrunk()
        cpu = time.process_time()
        for step in self.steps(workload):
            num_tokens += step.generated
            yield num_tokens
        yield RunResult(
            self.recorder.steps[-1].end,
            time.process_time() - cpu,
            self.outputs,
            self.recorder.steps,
            self.recorder.prefix_queries,
            self.recorder.prefix_hits,
            None if shrunk is None else (self._num_shrunk() or 0) - shrunk,
        )

    def _num_shrunk(self) -> int | None:
        """Requests that have shrunk under pressure so far; None: none can."""
        pressure = getattr(self.core.scheduler, "pressure", None)
        return None if pressure is None else int(pressure.counts["shrunk_requests"])
