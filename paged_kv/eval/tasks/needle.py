"""A pass key in a long text: is it found, at each depth and length?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from random import Random

from paged_kv.eval.tasks.example import Example
from paged_kv.eval.tasks.haystacks import NOISE, Growing, hide, read_words, sentences
from paged_kv.eval.tasks.prompts import CountTokens, Draft, TextPrompt, fit

TASK = "needle"
FILLER = NOISE
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key?"
ANSWER_PREFIX = " The pass key is"
MAX_NEW_TOKENS = 16  # five digits, by whatever tokenizer


def examples(
    lengths: Sequence[int],
    depths: Sequence[int],
    facts: int,
    seed: int,
    count_tokens: CountTokens,
    haystack: Path | None = None,
    room: int = 0,
) -> Iterator[Example]:
    """One example for each length, depth and fact, in this order.

    Args:
        lengths: most tokens of each prompt, which has at least 95 % of it.
        depths: after how many percent of the filler's sentences the needle stands.
        facts: keys that are asked for at each length and depth, each in a prompt of its own.
        seed: of the keys; those of a depth are the same at every length.
        count_tokens: of a text, by the model's tokenizer, without special tokens.
        haystack: a text file to take in place of FILLER, from its front.
        room: tokens of each length that are left free.

    Raises:
        ValueError: no length, depth or fact, a depth outside 0 to 100, a haystack that cannot be
            read; from the iterator: a length that is too short.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be numbers of at least 1, not {list(lengths)}")
    if not depths or not 0 <= min(depths) <= max(depths) <= 100:
        raise ValueError(f"depths must be percentages from 0 to 100, not {list(depths)}")
    if facts < 1:
        raise ValueError(f"facts must be at least 1, not {facts}")
    filler = cycle(sentences(FILLER.split() if haystack is None else read_words(haystack)))
    text = Growing(filler)

    def drawn() -> Iterator[Example]:
        for length in lengths:
            for depth in depths:
                for fact in range(facts):
                    yield _example(text, length, room, depth, fact, seed, count_tokens)

    return drawn()


def _example(
    text: Growing,
    length: int,
    room: int,
    depth: int,
    fact: int,
    seed: int,
    count_tokens: CountTokens,
) -> Example:
    key = str(Random(f"{TASK}-{seed}-{depth}-{fact}").randrange(10000, 100000))
    needle = NEEDLE.format(key=key)

    def build(count: int) -> TextPrompt:
        return TextPrompt(
            " ".join(hide(text.first(count), [(depth, needle)])), QUESTION, ANSWER_PREFIX
        )

    prompt = fit(Draft(build, (key,)), length - room, count_tokens, TASK)
    return Example(
        id=f"{TASK}-{length}-{seed}-{depth}-{fact}",
        task=TASK,
        context=prompt.context,
        question=prompt.question,
        answer_prefix=prompt.answer_prefix,
        answers=(key,),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="string_match_all",
        chat=False,
        info={"length": length, "depth": depth},
    )
