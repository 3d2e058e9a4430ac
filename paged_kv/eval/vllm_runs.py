"""Perplexity by vLLM: one request whose prompt is the text, and the log-probabilities of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from paged_kv.bench.settings import KV_DTYPE_BYTES, kv_bytes_per_token
from paged_kv.config import CompressionConfig
from paged_kv.eval.task import Case, Outcome, Task, check_case, entry_bytes
from paged_kv.vllm.driver.engine import engine_environment
from paged_kv.vllm.driver.score import prompt_logprobs

FLOAT32_BYTES = 4


def prepare() -> None:
    """Sets the environment for engines in this process; before torch is imported."""
    os.environ.update(engine_environment())


def run_all(task: Task, cases: list[Case], bar: Any) -> Iterator[Outcome]:
    """An outcome for each case; `bar` (tqdm) counts task.num_tokens for each."""
    chunk = task.num_prompt if task.protocol == "prompt" else 1
    token_bytes = kv_bytes_per_token(task.model) // KV_DTYPE_BYTES * FLOAT32_BYTES
    for case in cases:
        bar.set_description(f"{case.policy} {case.budget or ''}".strip())
        options = {} if case.config == CompressionConfig() else case.config.to_dict()
        logprobs, seconds = prompt_logprobs(
            str(task.model), options, task.tokens, chunk, task.page_size, token_bytes
        )
        bar.update(task.num_tokens)
        nll = -sum(logprobs[-task.num_scored :]) / task.num_scored
        kept = [
            task.num_seen - (schedule.evicted(task.num_seen, 0) if schedule else 0)
            for schedule in check_case(case, task)
        ]
        sizes = zip(kept, entry_bytes(case, task), strict=True)
        num_bytes = sum(count * size for count, size in sizes)
        yield Outcome(nll, sum(kept) / len(kept), num_bytes, seconds)
