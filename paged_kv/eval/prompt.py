"""What an engine is asked and what it answers, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Prompt(NamedTuple):
    """One question about a context.

    The context is processed as one chunk, then its cache is compressed. The question comes after
    that: a policy cannot know it. Where it should, it is part of the context.

    Args:
        context: at least one token.
        question: may be empty.
        max_new_tokens: greedy decoding ends after so many, or at a token of `stop`.
        stop: tokens that end an answer, and are not part of it.
        targets: to be predicted one after the other, instead of decoding: see Answer.nll.
    """

    context: Sequence[int]
    question: Sequence[int] = ()
    max_new_tokens: int = 0
    stop: frozenset[int] = frozenset()
    targets: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """Most tokens that are processed."""
        longest = max(self.max_new_tokens, len(self.targets))
        return len(self.context) + len(self.question) + longest


class Answer(NamedTuple):
    """What came back.

    Args:
        tokens: of the answer.
        kept: entries per layer, mean, right after the compression.
        cache_bytes: of their keys and values as pages store them.
        seconds: for all of it; what several cases share counts for each.
        nll: mean over the targets of -log p, in nats; None without targets.
    """

    tokens: Sequence[int]
    kept: float
    cache_bytes: int
    seconds: float
    nll: float | None = None
