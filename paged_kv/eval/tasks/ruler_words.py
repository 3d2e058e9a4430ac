"""RULER's common words (cwe) and frequent words (fwe): which words of a list come most often?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from string import ascii_lowercase

from paged_kv.eval.tasks.prompts import Draft, TextPrompt
from paged_kv.eval.tasks.words import ADJECTIVES, NOUNS, VERBS

CWE_MAX_NEW_TOKENS = 120
FWE_MAX_NEW_TOKENS = 50
_COMMON = 10  # words that are asked for
_SHORT = 4096  # below it words come less often, or they would not fit
_CWE = TextPrompt(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FWE = TextPrompt(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {text}",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_LETTERS = 6
_TOKENS_PER_WORD = 50  # of the length: how many coded words there are
_FEWEST_DRAWN = 200  # the three most frequent then come 30, 13 and 7 times, the next 4 times


def common_words(generator: Random, length: int) -> Draft:
    """One example: 10 words often, others seldom; before it a short list with its answer."""
    known = ADJECTIVES + NOUNS + VERBS
    words = generator.sample(known, len(known))
    if length < _SHORT:
        often, seldom, shot_words, shot_often, shot_seldom = 6, 1, 20, 3, 1
    else:
        often, seldom, shot_words, shot_often, shot_seldom = 30, 3, 40, 10, 3
    order, shot_order = generator.getrandbits(32), generator.getrandbits(32)
    example, words = words[:shot_words], words[shot_words:]
    shot = _list(example, shot_often, shot_seldom, shot_order).text + " "
    shot += _numbered(example[:_COMMON])

    def build(count: int) -> TextPrompt:
        asked = _list(words[: _COMMON + count], often, seldom, order)
        return TextPrompt(f"{shot}\n{asked.context}", asked.question, asked.answer_prefix)

    return Draft(build, tuple(words[:_COMMON]), most=len(words) - _COMMON)


def frequent_words(generator: Random, length: int) -> Draft:
    """One example: coded words whose numbers fall with the square of their rank (Zipf, 2).

    The first is "...", which does not count.
    """
    coded: dict[str, None] = {}
    while len(coded) < max(_COMMON, length // _TOKENS_PER_WORD):
        coded["".join(generator.choice(ascii_lowercase) for _ in range(_LETTERS))] = None
    words = ["...", *list(coded)[1:]]
    order = generator.getrandbits(32)

    def build(count: int) -> TextPrompt:
        drawn = _FEWEST_DRAWN + count
        numbers = [int(drawn * 6 / (math.pi * rank) ** 2) for rank in range(1, len(words) + 1)]
        text = " ".join(_shuffled(words, numbers, order))
        return TextPrompt(_FWE.context.format(text=text), _FWE.question, _FWE.answer_prefix)

    return Draft(build, tuple(words[1:4]))


def _list(words: Sequence[str], often: int, seldom: int, order: int) -> TextPrompt:
    numbers = [often] * _COMMON + [seldom] * (len(words) - _COMMON)
    text = _numbered(_shuffled(words, numbers, order))
    return TextPrompt(_CWE.context.format(text=text), _CWE.question, _CWE.answer_prefix)


def _shuffled(words: Sequence[str], numbers: Sequence[int], order: int) -> list[str]:
    """Each word so many times; `order` is a seed."""
    repeated = [word for word, number in zip(words, numbers, strict=True) for _ in range(number)]
    return Random(order).sample(repeated, len(repeated))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
