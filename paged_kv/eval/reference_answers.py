"""Answers by the reference engine: a context is processed once for all cases.

    context -> fork for each case -> compressed by its policy -> question, answer: all forks at once

While they decode, forks share the passes through the model, whose weights are read once for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from paged_kv.eval.cases import TRUNCATE, Case, context_of
from paged_kv.eval.prefills import Prefills
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.reference import engine as reference
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.eval.reference_runs import settled
from paged_kv.eval.running import Todo
from paged_kv.hf.driver.loading import load_model


def run_all(
    prompts: Sequence[Prompt], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Answer]]:
    """Answers of all cases to a prompt, then to the next; see RunAll."""
    model = load_model(cases[0].model)
    cases = settled(cases, model)
    bar.reset(len(prompts) * len(cases))
    for number, prompt in enumerate(prompts):
        wanted = [index for index in range(len(cases)) if todo(number, index)]
        bar.update(len(cases) - len(wanted))
        if wanted:
            found = answers(model, prompt, [cases[index] for index in wanted])
            for index, answer in zip(wanted, found, strict=True):
                bar.update()
                yield number, index, answer


@torch.inference_mode()
def answers(model: Any, prompt: Prompt, cases: Sequence[Case]) -> list[Answer]:
    """Of each case to one prompt."""
    assert not prompt.targets, "texts are predicted in reference_runs"
    configs = [case.config for case in cases]
    whole = Prefills(model, prompt.context, configs, cases[0].page_size)
    forks, last, seconds = [], [], []
    for case in cases:
        prefills = whole
        if case.policy == TRUNCATE:
            part = context_of(case, prompt.context)
            prefills = Prefills(model, part, [case.config], case.page_size)
        fork, duration = prefills.compressed(case.config)
        forks.append(fork)
        last.append(prefills.of(case.config).hidden)
        seconds.append(duration)
    held = [(sum(fork.num_kept) / len(fork.num_kept), fork.cache_bytes) for fork in forks]
    start = time.perf_counter()
    tokens = decode(forks, torch.cat(last), prompt)
    shared = (time.perf_counter() - start) / len(forks)
    return [
        Answer(found, *sizes, duration + shared)
        for found, sizes, duration in zip(tokens, held, seconds, strict=True)
    ]


def decode(
    engines: Sequence[ReferenceEngine], hidden: torch.Tensor, prompt: Prompt
) -> list[list[int]]:
    """The most likely tokens of each, without the one that ends an answer.

    Args:
        engines: of one model; they have processed the context.
        hidden: [engines, hidden], the last states of its last token.
        prompt: the question, and where answers end.
    """
    if prompt.question:
        hidden = reference.step(engines, [prompt.question] * len(engines))[:, -1]
    tokens: list[list[int]] = [[] for _ in engines]
    running = list(range(len(engines)))
    while running:
        new = dict(zip(running, engines[0].logits(hidden).argmax(-1).tolist(), strict=True))
        for row, token in new.items():
            if token not in prompt.stop:
                tokens[row].append(token)
        going = [row for row in running if new[row] not in prompt.stop]
        running = [row for row in going if len(tokens[row]) < prompt.max_new_tokens]
        if running:
            engines_left = [engines[row] for row in running]
            hidden = reference.step(engines_left, [[new[row]] for row in running])[:, -1]
    return tokens
