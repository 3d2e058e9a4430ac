"""Text without meaning, in which facts are hidden, and where in it.

Texts are the same for the same generator on every machine: only choice, sample and randrange of
random.Random are called, whose results have been the same in all versions since Python 3.9.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

from paged_kv.eval.tasks.words import ADJECTIVES, NOUNS, VERBS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_BEFORE_VOWEL = re.compile(r" a (?=[aeio]|u(?!ni|se))")
# {a}djectives, {n}ouns and {v}erbs: each is drawn anew.
_SENTENCES = (
    "The {a} {n} {v} the {n}.",
    "Every {n} has a {a} {n}.",
    "In the {a} {n} stood a {n}, and nobody {v} it.",
    "My {n} {v} a {n} and two {a} friends.",
    "Why the {n} {v} the {n} is a {a} question.",
    "Before the {n} came, they {v} the {a} {n} again.",
    "It was a {a} {n}, but the {n} {v} it.",
    "People said that the {n} {v} the {a} {n} near the {n}.",
    "Nothing is as {a} as a {n} that somebody {v}.",
    "Then she {v} the {n}, which was {a} and rather {a}.",
    "Most of what he {v} that year was {a}.",
    "If you ask the {n}, the {n} was never {a}.",
)
_DRAWN = {"a": ADJECTIVES, "n": NOUNS, "v": VERBS}


def read_words(path: Path) -> list[str]:
    """Of a text file, which the option `haystack` names.

    Raises:
        ValueError: no such file, not UTF-8, or empty.
    """
    if not path.is_file():
        raise ValueError(f"haystack {path}: no such file")
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {path} must be a text in UTF-8: {error}") from None
    if not words:
        raise ValueError(f"haystack {path} is empty")
    return words


def made_up(generator: Random) -> Iterator[str]:
    """The words of sentences that mean nothing, without end."""
    while True:
        sentence = generator.choice(_SENTENCES)
        filled = re.sub(r"\{(.)\}", lambda kind: generator.choice(_DRAWN[kind[1]]), sentence)
        yield from _BEFORE_VOWEL.sub(" an ", filled).split()


class Growing:
    """Takes any number of pieces from the front of an endless iterator, again and again."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._source = pieces
        self._taken: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first `count` pieces."""
        self._taken.extend(islice(self._source, max(0, count - len(self._taken))))
        return self._taken[:count]


def sentences(words: Sequence[str]) -> list[str]:
    """Words joined to sentences; the last one may lack its end."""
    return re.split(r"(?<=[.!?])\s+", " ".join(words)) if words else []


def hide(pieces: Sequence[str], facts: Sequence[tuple[int, str]]) -> list[str]:
    """Facts put between pieces.

    Args:
        pieces: in their order.
        facts: (depth, text): after how many percent of the pieces the text stands; those of one
            depth keep their order.

    Returns:
        Pieces and facts in the order in which they stand.
    """
    hidden, last = [], 0
    for depth, fact in sorted(facts, key=lambda one: one[0]):
        place = len(pieces) * depth // 100
        hidden += [*pieces[last:place], fact]
        last = place
    return [*hidden, *pieces[last:]]
