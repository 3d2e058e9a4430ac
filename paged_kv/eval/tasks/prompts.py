"""Prompts that are as long as asked for: what they are filled with grows until they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

CountTokens = Callable[[str], int]
# Of the length that was asked for, a prompt has at least this share, in percent.
LEAST_PERCENT = 95
_FIRST_STEP = 64


@dataclass(frozen=True)
class TextPrompt:
    """The three parts of an Example's prompt; what a model reads is one after the other."""

    context: str
    question: str
    answer_prefix: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Draft:
    """An example whose length is still open.

    Args:
        build: the prompt with so many pieces of filler; the more, the longer.
        answers: what the answer is compared with.
        info: of the Example, without its length.
        fewest: pieces of filler that the prompt must have.
        most: pieces that there are; None for any number.
        pad: the prompt with so many small pieces of other filler, where pieces are large.
    """

    build: Callable[[int], TextPrompt]
    answers: tuple[str, ...]
    info: dict[str, int | float | str] = field(default_factory=dict)
    fewest: int = 0
    most: int | None = None
    pad: Callable[[TextPrompt, int], TextPrompt] | None = None


def fit(draft: Draft, length: int, count_tokens: CountTokens, task: str) -> TextPrompt:
    """The longest prompt of at most `length` tokens.

    Args:
        draft: what to build it of.
        length: most tokens of the whole prompt.
        count_tokens: of a text, by the model's tokenizer, without special tokens.
        task: for messages.

    Raises:
        ValueError: the shortest prompt is longer, or no prompt has 95 % of that.
    """

    def tokens(prompt: TextPrompt) -> int:
        return count_tokens(prompt.text)

    shortest = tokens(draft.build(draft.fewest))
    if shortest > length:
        raise ValueError(f"length {length} is too short for {task}, which needs {shortest} tokens")
    prompt = _longest(draft.build, tokens, length, draft.fewest, draft.most)
    if draft.pad is not None and not _long_enough(tokens(prompt), length):
        whole, pad = prompt, draft.pad
        prompt = _longest(lambda count: pad(whole, count), tokens, length)
    if not _long_enough(tokens(prompt), length):
        raise ValueError(
            f"length {length}: {task} comes to {tokens(prompt)} tokens, less than "
            f"{LEAST_PERCENT} % of it: take another length"
        )
    return prompt


def _longest(
    build: Callable[[int], TextPrompt],
    tokens: Callable[[TextPrompt], int],
    length: int,
    fewest: int = 0,
    most: int | None = None,
) -> TextPrompt:
    """Of at most `length` tokens, which the prompt with the fewest pieces must not exceed.

    Tokens grow nearly as the pieces do, so a line through two counts finds the third.
    """
    low, low_tokens = fewest, tokens(build(fewest))
    step = _FIRST_STEP
    while True:  # until one is too long
        if low == most:
            return build(low)
        high = low + step if most is None else min(low + step, most)
        high_tokens = tokens(build(high))
        if high_tokens > length:
            break
        grown = max(1, high_tokens - low_tokens)
        step = 1 + (length - high_tokens) * (high - low) // grown
        low, low_tokens = high, high_tokens
    while high - low > 1:
        guess = low + (length - low_tokens) * (high - low) // (high_tokens - low_tokens)
        middle = min(max(guess, low + 1), high - 1)
        middle_tokens = tokens(build(middle))
        if middle_tokens > length:
            high, high_tokens = middle, middle_tokens
        else:
            low, low_tokens = middle, middle_tokens
    return build(low)


def _long_enough(tokens: int, length: int) -> bool:
    return 100 * tokens >= LEAST_PERCENT * length
