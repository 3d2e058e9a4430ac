"""Peers in the same run as policies: see paged_kv.eval.peers for who they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paged_kv.core.schedule import Schedule
from paged_kv.eval.cases import Case
from paged_kv.eval.peers import peers
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.running import RunAll, Todo
from paged_kv.eval.task import Outcome, Task


def with_peers(
    run_all: RunAll,
    kvpress_python: str | None,
    prompt_of: Callable[[Any], Prompt] = lambda prompt: prompt,
    outcome_of: Callable[[Answer], Any] = lambda answer: answer,
) -> RunAll:
    """Policies by an engine, then peers each by its own.

    Args:
        run_all: the engine.
        kvpress_python: see peers.answers.
        prompt_of: what a peer is asked, of a sample.
        outcome_of: what its answer is to the evaluation.
    """

    def run(
        samples: Sequence[Any], cases: Sequence[Case], todo: Todo, bar: Any
    ) -> Iterator[tuple[int, int, Any]]:
        own = [index for index, case in enumerate(cases) if not case.is_peer]
        if own:
            several = [cases[index] for index in own]
            found = run_all(samples, several, lambda n, place: todo(n, own[place]), bar)
            for number, place, outcome in found:
                yield number, own[place], outcome
        others = [index for index, case in enumerate(cases) if case.is_peer]
        if others:
            bar.unit = "answer"  # of policies in perplexity it counts tokens
            bar.reset(len(samples) * len(others))
        for index in others:
            case = cases[index]
            bar.set_description(str(case))
            wanted = [number for number in range(len(samples)) if todo(number, index)]
            bar.update(len(samples) - len(wanted))
            if not wanted:
                continue
            prompts = [prompt_of(samples[number]) for number in wanted]
            kept = None if case.budget is None else _entries(case)
            answers = peers.answers(case.policy, case.model, prompts, kept, kvpress_python)
            for number, answer in zip(wanted, answers, strict=True):
                bar.update()
                yield number, index, outcome_of(answer)

    return run


def _entries(case: Case) -> Callable[[int], int]:
    """As many as a layer under a policy of that budget holds, in whole pages: at equal memory."""
    schedule = next(each for each in case.schedules() if isinstance(each, Schedule))
    return lambda num_tokens: num_tokens - schedule.evicted(num_tokens, 0)


def prompt_of_window(task: Task) -> Prompt:
    """What makes a window's predictions: token N sees the compressed cache, and predicts N + 1."""
    first = task.num_prompt
    return Prompt(
        task.tokens[:first], task.tokens[first : first + 1], targets=task.tokens[first + 1 :]
    )


def outcome_of(answer: Answer) -> Outcome:
    """Of a window."""
    assert answer.nll is not None
    return Outcome(answer.nll, None, answer.kept, answer.cache_bytes, answer.seconds)
