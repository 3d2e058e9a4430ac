"""RULER's tasks of any length, from seeds.

Templates and settings are those of https://github.com/NVIDIA/RULER (Apache-2.0). Ours are the
words, and the essays, which are sentences made of them unless a text is given; the essays that
RULER takes may not be passed on. Its two tasks of questions over documents (qa) are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from paged_kv.eval.tasks import ruler_needles, ruler_variables, ruler_words
from paged_kv.eval.tasks.example import Example
from paged_kv.eval.tasks.haystacks import read_words
from paged_kv.eval.tasks.prompts import CountTokens, Draft, fit

TASKS = (*ruler_needles.TASKS, "vt", "cwe", "fwe")


def examples(
    task: str,
    length: int,
    count: int,
    seed: int,
    count_tokens: CountTokens,
    haystack: Path | None = None,
    room: int = 0,
) -> Iterator[Example]:
    """Examples of a task; the first ones are the same for any count.

    Args:
        task: of TASKS.
        length: most tokens of context, question and answer prefix together; they have at least 95 %
            of it. A chat template and the answer come on top.
        count: how many.
        seed: the same seed gives the same examples, on every machine.
        count_tokens: of a text, by the model's tokenizer, without special tokens.
        haystack: a text file (essays, a book) to hide needles in, for the tasks with essays; the
            others ignore it. It is read from its front, again if it is too short.
        room: tokens of the length that are left free.

    Raises:
        ValueError: no such task, a number below 1, a haystack that cannot be read; from the
            iterator: a length that is too short for the task.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} must be one of {', '.join(TASKS)}")
    for name, number in (("length", length), ("count", count)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    draft, max_new_tokens = _drafting(task, length, haystack)

    def drawn() -> Iterator[Example]:
        for index in range(count):
            name = f"{task}-{length}-{seed}-{index}"
            one = draft(Random(name), index)  # a text as seed, hashed with SHA-512
            prompt = fit(one, length - room, count_tokens, task)
            yield Example(
                id=name,
                task=task,
                context=prompt.context,
                question=prompt.question,
                answer_prefix=prompt.answer_prefix,
                answers=one.answers,
                max_new_tokens=max_new_tokens,
                metric="string_match_all",
                info={"length": length, **one.info},
            )

    return drawn()


def _drafting(
    task: str, length: int, haystack: Path | None
) -> tuple[Callable[[Random, int], Draft], int]:
    """What makes the task's examples, and the most tokens of an answer."""
    essay = None if haystack is None else read_words(haystack)
    if task == "vt":
        return lambda own, _: ruler_variables.draft(own), ruler_variables.MAX_NEW_TOKENS
    if task == "cwe":
        most = ruler_words.CWE_MAX_NEW_TOKENS
        return lambda own, _: ruler_words.common_words(own, length), most
    if task == "fwe":
        most = ruler_words.FWE_MAX_NEW_TOKENS
        return lambda own, _: ruler_words.frequent_words(own, length), most
    needles = ruler_needles.TASKS[task]
    return (
        lambda own, index: ruler_needles.draft(needles, own, index, essay),
        ruler_needles.MAX_NEW_TOKENS,
    )
