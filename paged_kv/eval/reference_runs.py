"""Perplexity by the reference engine: a prompt is processed once for all cases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from paged_kv.config import CompressionConfig
from paged_kv.eval.cases import Case
from paged_kv.eval.prefills import Prefills
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.eval.running import Todo
from paged_kv.eval.scoring import Score
from paged_kv.eval.task import Outcome, Task
from paged_kv.hf.driver.loading import load_model

MOST_AT_ONCE = 256  # tokens
FULL = CompressionConfig()  # what others are compared with: everything kept, as computed


class _Runs(Protocol):
    """One window under one config after another."""

    def run(self, config: CompressionConfig, score: Score, bar: Any) -> Outcome: ...


def run_all(
    windows: Sequence[Task], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Outcome]]:
    """Predictions of every case in a window, then in the next; see RunAll.

    The bar counts tokens, also those of the full cache, which is run whether or not it is asked
    for: others are compared with it.
    """
    model = load_model(cases[0].model)
    cases = settled(cases, model)
    others = sum(case.config != FULL for case in cases)
    bar.reset(len(windows) * windows[0].num_tokens * (others + 1))
    for place, task in enumerate(windows):
        wanted = [index for index in range(len(cases)) if todo(place, index)]
        if not wanted:
            bar.update(task.num_tokens * (others + 1))
            continue
        runs: _Runs
        runs = _Prompts(task, cases, model) if task.protocol == "prompt" else _Streams(task, model)
        bar.set_description("full")
        score = Score(model)
        full, hidden = runs.run(FULL, score, bar), score.hidden
        for index in wanted:
            case = cases[index]
            if case.config == FULL:
                yield place, index, full
                continue
            bar.set_description(str(case))
            yield place, index, runs.run(case.config, Score(model, hidden), bar)


def settled(cases: Sequence[Case], model: Any) -> list[Case]:
    """With what policies leave open decided for this engine, which can sum attention for all."""
    decoder = model.config.get_text_config()
    return [
        replace(case, config=case.config.settled(str(case.model), True, decoder)) for case in cases
    ]


class _Prompts:
    """The prompt, compressed once.

    Args:
        task: see Task.
        cases: all that will be run.
        model: see load_model.
    """

    def __init__(self, task: Task, cases: Sequence[Case], model: Any) -> None:
        self.task = task
        configs = [case.config for case in cases]
        prompt = task.tokens[: task.num_prompt]
        self.prefills = Prefills(model, prompt, configs, task.page_size)

    def run(self, config: CompressionConfig, score: Score, bar: Any) -> Outcome:
        """Compresses the prompt's cache and scores the rest of the tokens from it."""
        task = self.task
        engine, seconds = self.prefills.compressed(config)
        bar.update(task.num_prompt)
        begin = time.perf_counter()
        kept, num_bytes = _mean(engine.num_kept), engine.cache_bytes
        for start, end in _cuts(task.num_prompt, task.num_tokens - 1, _at_once(config, task)):
            hidden = engine.process(task.tokens[start:end], compact=False)
            score.add(hidden, task.tokens[start + 1 : end + 1])
        bar.update(task.num_tokens - task.num_prompt)
        return _outcome(score, kept, num_bytes, seconds + time.perf_counter() - begin)


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

    def run(self, config: CompressionConfig, score: Score, bar: Any) -> Outcome:
        """Processes all tokens and scores those after the first num_prompt."""
        task = self.task
        start_time = time.perf_counter()
        engine = ReferenceEngine(self.model, config, task.page_size)
        for start, end in _chunks(engine, task.num_tokens, _at_once(config, task)):
            hidden = engine.process(task.tokens[start:end])
            first = max(start, task.num_prompt - 1)  # the first token that predicts a target
            last = min(end, task.num_tokens - 1)  # the last token predicts nothing
            if first < last:
                targets = task.tokens[first + 1 : last + 1]
                score.add(hidden[first - start : last - start], targets)
            bar.update(end - start)
        seconds = time.perf_counter() - start_time
        return _outcome(score, _mean(engine.num_kept), engine.cache_bytes, seconds)


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


def _outcome(score: Score, kept: float, num_bytes: int, seconds: float) -> Outcome:
    """Of a run that took so long together with the comparison, which is not the policy's cost."""
    means = score.nll / score.count, score.kl / score.count
    return Outcome(*means, kept, num_bytes, seconds - score.seconds_of_kl)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)
