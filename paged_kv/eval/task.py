"""A window of a text, to be predicted: plain data, for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Task:
    """One window of a text, to be predicted; see paged_kv.eval.perplexity for the protocols.

    Args:
        model: a model directory.
        protocol: prompt or stream.
        num_prompt: tokens N before the scored ones.
        num_scored: targets M.
        page_size: entries are dropped in multiples of it.
        tokens: num_tokens of them.
        offset: tokens of the text before them.
    """

    model: Path
    protocol: str
    num_prompt: int
    num_scored: int
    page_size: int
    tokens: Sequence[int] = ()
    offset: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the text that are needed. Of a prompt, token N has no target but itself."""
        return self.num_prompt + self.num_scored + (self.protocol == "prompt")

    @property
    def num_seen(self) -> int:
        """Tokens processed when the entries that are held are counted."""
        return self.num_prompt if self.protocol == "prompt" else self.num_tokens

    def at(self, offset: int, text: Sequence[int]) -> Task:
        """The same with its tokens, those of a text after the first `offset`."""
        return replace(self, tokens=text[offset : offset + self.num_tokens], offset=offset)


class Outcome(NamedTuple):
    """What an engine found in one window."""

    nll: float
    kl: float | None  # from the full cache; None if the engine does not know
    kept: float
    cache_bytes: int
    seconds: float


def read_windows(
    task: Task, file: Path, offset: int = 0, windows: int = 1, stride: int = 0
) -> list[Task]:
    """The task at `offset` tokens of a file, and again every `stride` tokens after it.

    Raises:
        ValueError: the text is too short.
    """
    from paged_kv.hf.driver.loading import encode

    if not file.is_file():
        raise ValueError(f"text {file}: no such file")
    tokens = encode(task.model, file.read_text(encoding="utf-8", errors="replace"))
    offsets = [offset + index * stride for index in range(windows)]
    need = offsets[-1] + task.num_tokens
    if len(tokens) < need:
        several = f"windows {windows}, stride {stride}, " if windows > 1 else ""
        raise ValueError(
            f"text {file} has {len(tokens)} tokens; offset {offset}, {several}prompt-tokens "
            f"{task.num_prompt} and score-tokens {task.num_scored} need {need}"
        )
    return [task.at(first, tokens) for first in offsets]
