"""RULER's needles in a haystack (niah): which numbers or UUIDs belong to a key?"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, repeat
from random import Random

from paged_kv.eval.tasks.haystacks import NOISE, Growing, hide, made_up, sentences
from paged_kv.eval.tasks.prompts import Draft, TextPrompt
from paged_kv.eval.tasks.words import ADJECTIVES, NOUNS

MAX_NEW_TOKENS = 128
DEPTHS = [(200 * step + 39) // 78 for step in range(40)]  # 0 to 100 percent, as RULER's
_STRIDE = 23  # through DEPTHS: neighbours lie far apart, and all 40 come before one comes again
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = TextPrompt(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{text}",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_SEVERAL = TextPrompt(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{text}",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Needles:
    """What a task hides, and in what.

    Args:
        haystack: noise (a line that repeats), essay (sentences), or needle (others like it).
        keys: words or uuids.
        values: numbers or uuids.
        num_keys: different keys that needles are hidden for.
        num_values: needles of each key.
        num_asked: keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_asked=4),
}


def draft(task: Needles, generator: Random, index: int, essay: Sequence[str] | None) -> Draft:
    """One example.

    Args:
        task: of TASKS.
        generator: of this example alone.
        index: its number; where one needle is asked for, its depth comes from it.
        essay: words to hide needles in, for the haystack essay; None to make sentences up.
    """
    keys, values = _distinct(task.keys, generator), _distinct(task.values, generator)
    needles = [(next(keys), next(values)) for _ in range(task.num_keys)]
    needles += [(needles[0][0], next(values)) for _ in range(task.num_values - 1)]
    asked = [key for key, _ in needles[: task.num_asked]]
    answers = tuple(value for key, value in needles if key in asked)
    info: dict[str, int | float | str] = {}
    if len(answers) == 1:
        first = DEPTHS[(index + 1) * _STRIDE % len(DEPTHS)]  # few of them do not begin at an end
        others = [depth for depth in DEPTHS if depth != first]
        depths = [first, *generator.sample(others, len(needles) - 1)]
        info["depth"] = first
    else:
        depths = generator.sample(DEPTHS, len(needles))
    facts = [(depth, _sentence(task, *one)) for depth, one in zip(depths, needles, strict=True)]
    if task.haystack == "noise":
        filler: Iterator[str] = repeat(NOISE)
    elif task.haystack == "needle":
        filler = (_sentence(task, *one) for one in zip(keys, values, strict=True))
    else:
        filler = made_up(generator) if essay is None else cycle(essay)
    build = _builder(task, Growing(filler), facts, asked, len(answers))
    return Draft(build, answers, info, pad=_pad if task.haystack == "needle" else None)


def _builder(
    task: Needles,
    filler: Growing,
    facts: Sequence[tuple[int, str]],
    asked: Sequence[str],
    num_answers: int,
) -> Callable[[int], TextPrompt]:
    """Of a prompt with so many words of an essay, or lines of another haystack."""
    several = num_answers > 1
    template = _SEVERAL if several else _ONE
    names = {
        "kind": task.values if several else task.values.removesuffix("s"),
        "query": ", ".join(asked[:-1]) + f", and {asked[-1]}" if asked[1:] else asked[0],
    }

    def build(count: int) -> TextPrompt:
        pieces = filler.first(count)
        if task.haystack == "essay":
            text = " ".join(hide(sentences(pieces), facts))
        else:
            text = "\n".join(hide(pieces, facts))
        return TextPrompt(
            template.context.format(text=text, **names),
            template.question.format(**names),
            template.answer_prefix.format(**names),
        )

    return build


def _pad(prompt: TextPrompt, count: int) -> TextPrompt:
    """With so many short sentences of noise at the end: a line of UUIDs has 70 tokens."""
    noise = " ".join(islice(cycle(sentences(NOISE.split())), count))
    return replace(prompt, context=f"{prompt.context}\n{noise}") if count else prompt


def _sentence(task: Needles, key: str, value: str) -> str:
    return _NEEDLE.format(kind=task.values, key=key, value=value)


def _distinct(kind: str, generator: Random) -> Iterator[str]:
    """Of words, numbers or uuids, none twice."""
    seen: set[str] = set()
    while True:
        if kind == "words":
            new = f"{generator.choice(ADJECTIVES)}-{generator.choice(NOUNS)}"
        elif kind == "numbers":
            new = str(generator.randrange(10**6, 10**7))
        else:
            new = str(uuid.UUID(int=generator.getrandbits(128), version=4))
        if new not in seen:
            seen.add(new)
            yield new
