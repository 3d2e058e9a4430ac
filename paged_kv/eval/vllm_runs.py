"""Perplexity by vLLM: requests whose prompts are the windows, and the log-probabilities of them.

An engine gives no whole distributions, so nothing is said about the divergence.
"""

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


def run_all(windows: list[Task], cases: list[Case], bar: Any) -> Iterator[tuple[int, Outcome]]:
    """(index of a case, outcome): of the first case in every window, then of the next.

    Args:
        windows: one task in several places; an engine is started once for all of them.
        cases: all that will be run.
        bar: tqdm; it counts the tokens of every window, for each case.
    """
    task, texts = windows[0], [window.tokens for window in windows]
    bar.reset(len(windows) * task.num_tokens * len(cases))
    chunk = task.num_prompt if task.protocol == "prompt" else 1
    token_bytes = kv_bytes_per_token(task.model) // KV_DTYPE_BYTES * FLOAT32_BYTES
    for index, case in enumerate(cases):
        bar.set_description(f"{case.policy} {case.budget or ''}".strip())
        options = {} if case.config == CompressionConfig() else case.config.to_dict()
        kept, num_bytes = _held(case, task)
        runs = prompt_logprobs(str(task.model), options, texts, chunk, task.page_size, token_bytes)
        for logprobs, seconds in runs:
            bar.update(task.num_tokens)
            nll = -sum(logprobs[-task.num_scored :]) / task.num_scored
            yield index, Outcome(nll, None, kept, num_bytes, seconds)


def _held(case: Case, task: Task) -> tuple[float, int]:
    """(entries per layer, mean; bytes) when they are counted, which the schedules say."""
    kept = [
        task.num_seen - (schedule.evicted(task.num_seen, 0) if schedule else 0)
        for schedule in check_case(case, task)
    ]
    sizes = zip(kept, entry_bytes(case, task), strict=True)
    return sum(kept) / len(kept), sum(count * size for count, size in sizes)
