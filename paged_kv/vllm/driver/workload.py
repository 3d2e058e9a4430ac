"""What an engine is started with and what it is given to do. Plain data: imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paged_kv.config import DEFAULT_PAGE_SIZE

Tokens = list[int]


@dataclass(frozen=True)
class EngineSettings:
    """One vLLM engine.

    Args:
        model: a model directory.
        pool_bytes: memory of the KV cache.
        max_model_len: longest prompt and output together.
        policy: options as in additional_config["paged_kv"]; empty for plain vLLM.
        block_size: tokens per page; None for vLLM's default.
        max_num_seqs: sequences that may run at once.
        prefix_caching: whether vLLM's prefix cache is on.
        kv_cache_dtype: vLLM's option of that name.
        dtype: the model's.
    """

    model: str
    pool_bytes: int
    max_model_len: int
    policy: Mapping[str, Any] = field(default_factory=dict)
    block_size: int | None = DEFAULT_PAGE_SIZE
    max_num_seqs: int = 64
    prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once and are decoded greedily.

    Args:
        prompts: token ids.
        output_len: tokens per request, whatever the model would like (ignore_eos).
        reset_prefix_cache: forget cached prefixes first.
        preempt_every: steps after which all running requests are preempted; 0: only if they must.
    """

    prompts: Sequence[Tokens]
    output_len: int
    reset_prefix_cache: bool = True
    preempt_every: int = 0

    @property
    def output_tokens(self) -> int:
        return len(self.prompts) * self.output_len


class EngineInfo(NamedTuple):
    """What an engine has to work with, and what it says about that."""

    num_pages: int  # vLLM's null page not counted
    page_bytes: int  # of a page: all layers of one group
    kv_tokens: int  # "KV cache size" as vLLM reports it
    kv_sequences: float  # "Maximum concurrency" as vLLM reports it
    decode_sequences: float  # sequences of max_model_len once their prompts are done
    start_seconds: float


class MemoryReport(NamedTuple):
    """What an engine holds, counted in several places."""

    pool_pages: int  # of vLLM's block pool, its null page included
    tensor_bytes: int  # of the tensors for keys and values
    beside_bytes: int  # of a policy's tensors beside them
    grown_bytes: int  # of the process's or the GPU's memory, when the tensors were made
    num_tokens: int  # of a single request, when the following are counted
    held_pages: int  # of the block pool, in use
    held_groups: list[tuple[list[int], int, int]]  # (layers, entries of each, pages) of managers
    peak_pages: int  # in use during the workload
    peak_running: int  # sequences
    seconds: float  # of the workload


class Step(NamedTuple):
    """One step of an engine."""

    end: float  # seconds since the run began
    generated: int  # output tokens
    prefilled: int  # prompt tokens
    running: int  # sequences
    pages: int  # in use
    preempted: int
    computed: int  # tokens that went through the model, again those of preempted requests


@dataclass
class RunResult:
    """A workload that was run.

    Args:
        seconds: by the clock.
        cpu_seconds: of the engine's process; with one thread, a busy machine does not disturb it.
        outputs: tokens of each request.
        steps: what happened.
        prefix_queries: prompt tokens that were looked up in the prefix cache.
        prefix_hits: those that were found.
        shrunk: requests that shrank to their budgets under pressure; None: there is no such thing.
    """

    seconds: float
    cpu_seconds: float
    outputs: list[Tokens]
    steps: list[Step]
    prefix_queries: int
    prefix_hits: int
    shrunk: int | None = None

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def preemptions(self) -> int:
        return sum(step.preempted for step in self.steps)

    @property
    def computed_tokens(self) -> int:
        return sum(step.computed for step in self.steps)

    @property
    def peak_pages(self) -> int:
        return max(step.pages for step in self.steps)

    @property
    def peak_running(self) -> int:
        return max(step.running for step in self.steps)
