"""Perplexity by vLLM: requests whose prompts are the windows, and the log-probabilities of them.

An engine gives no whole distributions, so nothing is said about the divergence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import CompressionConfig
from paged_kv.eval.cases import Case
from paged_kv.eval.running import Todo
from paged_kv.eval.task import Outcome, Task
from paged_kv.vllm.driver.engine import engine_environment
from paged_kv.vllm.driver.score import prompt_logprobs


def prepare() -> None:
    """Sets the environment for engines in this process; before torch is imported."""
    os.environ.update(engine_environment())


def run_all(
    windows: Sequence[Task], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Outcome]]:
    """Predictions of a case in every window, then of the next; see RunAll. The bar counts tokens.

    An engine is started once for all windows.
    """
    task = windows[0]
    bar.reset(len(windows) * task.num_tokens * len(cases))
    chunk = task.num_prompt if task.protocol == "prompt" else 1
    for index, case in enumerate(cases):
        bar.set_description(str(case))
        wanted = [place for place in range(len(windows)) if todo(place, index)]
        bar.update((len(windows) - len(wanted)) * task.num_tokens)
        if not wanted:
            continue
        texts = [windows[place].tokens for place in wanted]
        token_bytes = kv_bytes_per_token(case.model, "float32")
        options = {} if case.config == CompressionConfig() else case.config.to_dict()
        held = case.held(task.num_seen)
        runs = prompt_logprobs(str(case.model), options, texts, chunk, task.page_size, token_bytes)
        for place, (logprobs, seconds) in zip(wanted, runs, strict=True):
            bar.update(task.num_tokens)
            nll = -sum(logprobs[-task.num_scored :]) / task.num_scored
            yield place, index, Outcome(nll, None, held.kept, held.cache_bytes, seconds)
