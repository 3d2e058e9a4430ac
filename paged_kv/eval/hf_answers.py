"""Answers, and perplexity, by transformers with a PagedCache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from paged_kv.eval.cases import Case, context_of
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.running import Todo
from paged_kv.eval.task import Outcome, Task
from paged_kv.hf.driver.reading import Reader


def run_all(
    prompts: Sequence[Prompt], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Answer]]:
    """Answers of a case to all prompts, then of the next; see RunAll."""
    bar.reset(len(prompts) * len(cases))
    reader = Reader(cases[0].model)
    for index, case in enumerate(cases):
        bar.set_description(str(case))
        reader.use(case.config, case.page_size)
        for number, prompt in enumerate(prompts):
            if todo(number, index):
                yield number, index, answer(reader, prompt, case)
            bar.update()


def answer(reader: Reader, prompt: Prompt, case: Case) -> Answer:
    """Of one case to one prompt."""
    start = time.perf_counter()
    reader.begin()
    context = context_of(case, prompt.context)
    token = reader.read(context)
    held = case.held(len(context))
    if prompt.question:
        token = reader.read(prompt.question)
    tokens: list[int] = []
    while token not in prompt.stop:
        tokens.append(token)
        if len(tokens) == prompt.max_new_tokens:
            break
        token = reader.read([token])
    return Answer(tokens, held.kept, held.cache_bytes, time.perf_counter() - start)


def run_windows(
    windows: Sequence[Task], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Outcome]]:
    """Predictions of a case in all windows, then of the next; see RunAll. The bar counts tokens."""
    bar.reset(len(windows) * windows[0].num_tokens * len(cases))
    reader = Reader(cases[0].model)
    for index, case in enumerate(cases):
        bar.set_description(str(case))
        reader.use(case.config, case.page_size)
        for place, task in enumerate(windows):
            if todo(place, index):
                yield place, index, _predict(reader, task, case)
            bar.update(task.num_tokens)


def _predict(reader: Reader, task: Task, case: Case) -> Outcome:
    """Of one case in one window, whose last token predicts nothing."""
    start = time.perf_counter()
    reader.begin()
    if task.protocol == "prompt":
        reader.read(task.tokens[: task.num_prompt])
        loss = reader.loss(task.tokens[task.num_prompt :])
    else:
        loss = 0.0
        for place in range(task.num_tokens - 1):
            found = reader.loss(task.tokens[place : place + 2])
            loss += found if place >= task.num_prompt - 1 else 0.0
    held = case.held(task.num_seen)
    seconds = time.perf_counter() - start
    return Outcome(loss / task.num_scored, None, held.kept, held.cache_bytes, seconds)
