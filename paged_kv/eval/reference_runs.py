"""Perplexity by the reference engine. One prompt is processed once for all policies it can serve.

A policy that accumulates scores must see every token: its budgets share a prompt, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.eval.task import Case, Outcome, Task
from paged_kv.hf.driver.loading import load_model

MOST_AT_ONCE = 256  # tokens, and rows of logits


def run_all(task: Task, cases: list[Case], bar: Any) -> Iterator[Outcome]:
    """An outcome for each case; `bar` (tqdm) counts task.num_tokens for each."""
    model = load_model(task.model)
    run = (
        _Prompts(task, cases, model).run if task.protocol == "prompt" else _Streams(task, model).run
    )
    for case in cases:
        bar.set_description(f"{case.policy} {case.budget or ''}".strip())
        yield run(case.config, bar)


class _Prompts:
    """The prompt, compressed once.

    Args:
        task: see Task.
        cases: all that will be run.
        model: see load_model.
    """

    def __init__(self, task: Task, cases: list[Case], model: Any) -> None:
        self.task, self.model = task, model
        enabled = [case.config.create_policy() for case in cases if case.config.enabled]
        self.observe = max((policy.observation_window for policy in enabled), default=0)
        self.prefills: dict[Any, tuple[ReferenceEngine, float]] = {}

    def run(self, config: CompressionConfig, bar: Any) -> Outcome:
        """Compresses the prompt's cache and scores the rest of the tokens from it."""
        task = self.task
        prefill, seconds = self._prefill(config)
        bar.update(task.num_prompt)
        begin = time.perf_counter()
        engine = prefill.fork(config)
        engine.compact()
        kept, num_bytes = _mean(engine.num_kept), engine.cache_bytes
        total, size = 0.0, _at_once(config, task)
        for start, end in _cuts(task.num_prompt, task.num_tokens - 1, size):
            hidden = engine.process(task.tokens[start:end], compact=False)
            total += _sum_nll(engine, hidden, task.tokens[start + 1 : end + 1])
        nll = total / task.num_scored
        bar.update(task.num_tokens - task.num_prompt)
        return Outcome(nll, kept, num_bytes, seconds + time.perf_counter() - begin)

    def _prefill(self, config: CompressionConfig) -> tuple[ReferenceEngine, float]:
        """An engine that has processed the prompt and dropped nothing, and the seconds it took."""
        base = CompressionConfig(
            page_format=config.page_format, residual_pages=config.residual_pages
        )
        key: Any = config.page_format
        if config.enabled and "scores" in config.create_policy().reads:
            options = tuple(sorted(config.options.items()))
            settings = (config.selector, config.num_sink_tokens, config.recent_window, options)
            key, base = (config.page_format, settings), config
        if key not in self.prefills:
            start = time.perf_counter()
            engine = ReferenceEngine(self.model, base, self.task.page_size, observe=self.observe)
            engine.process(self.task.tokens[: self.task.num_prompt], compact=False)
            self.prefills[key] = engine, time.perf_counter() - start
        return self.prefills[key]


class _Streams:
    """Token after token.

    Tokens between which nothing is dropped are processed at once: each attends to the same entries
    as it would by itself, and policies accumulate the same, however tokens are chunked.

    Args:
        task: see Task.
        model: see load_model.
    """

    def __init__(self, task: Task, model: Any) -> None:
        self.task, self.model = task, model

    def run(self, config: CompressionConfig, bar: Any) -> Outcome:
        """Processes all tokens and scores those after the first num_prompt."""
        task = self.task
        start_time = time.perf_counter()
        engine = ReferenceEngine(self.model, config, task.page_size)
        total = 0.0
        for start, end in _chunks(engine, task.num_tokens, _at_once(config, task)):
            hidden = engine.process(task.tokens[start:end])
            first = max(start, task.num_prompt - 1)  # the first token that predicts a target
            last = min(end, task.num_tokens - 1)  # the last token predicts nothing
            if first < last:
                targets = task.tokens[first + 1 : last + 1]
                total += _sum_nll(engine, hidden[first - start : last - start], targets)
            bar.update(end - start)
        seconds = time.perf_counter() - start_time
        return Outcome(total / task.num_scored, _mean(engine.num_kept), engine.cache_bytes, seconds)


def _at_once(config: CompressionConfig, task: Task) -> int:
    """Steps end at multiples of it. The residual of a token is that of its page's last token."""
    return task.page_size if config.residual_pages else MOST_AT_ONCE


def _chunks(engine: ReferenceEngine, num_tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of tokens; something is dropped at their ends only."""
    start = 0
    for end in range(1, num_tokens + 1):
        if end == num_tokens or end % size == 0 or engine.drops_at(end):
            yield start, end
            start = end


def _cuts(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a range that end at multiples of size."""
    while start < end:
        stop = min(end, (start // size + 1) * size)
        yield start, stop
        start = stop


def _sum_nll(engine: ReferenceEngine, hidden: torch.Tensor, targets: Any) -> float:
    """Sum of -log p of the targets, one for each hidden state."""
    wanted = torch.tensor(list(targets), device=hidden.device)
    total = 0.0
    for rows, labels in zip(hidden.split(MOST_AT_ONCE), wanted.split(MOST_AT_ONCE), strict=True):
        total += F.cross_entropy(engine.logits(rows).float(), labels, reduction="sum").item()
    return total


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)
