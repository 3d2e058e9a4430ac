"""A window of a text, to be predicted: plain data, for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv.bench.settings import decoder_config


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

    def asked(self, stride: int | None) -> dict[str, Any]:
        """Fields of a row that say what was asked, of the first window.

        Args:
            stride: tokens between windows; None: they follow each other.
        """
        fields = {"prompt_tokens": self.num_prompt, "score_tokens": self.num_scored}
        fields["offset"] = self.offset
        return fields if stride is None else {**fields, "stride": stride}

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
    task: Task,
    file: Path,
    offset: int = 0,
    windows: int = 1,
    stride: int = 0,
    scored: str = "score-tokens",
) -> list[Task]:
    """The task at `offset` tokens of a file, and again every `stride` tokens after it.

    Args:
        task: without tokens.
        file: a text.
        offset: of the first window.
        windows: how many.
        stride: tokens between their beginnings.
        scored: the option that says how many tokens follow the prompt.

    Raises:
        ValueError: the text is too short, or the model's context.
    """
    from paged_kv.hf.driver.loading import encode

    if offset < 0:
        raise ValueError(f"offset must be an integer >= 0, not {offset}")
    limit = decoder_config(task.model).get("max_position_embeddings")
    if limit is not None and task.num_tokens > limit:
        raise ValueError(
            f"prompt-tokens {task.num_prompt} and {scored} {task.num_scored} need "
            f"{task.num_tokens} tokens; the model has {limit}"
        )
    if not file.is_file():
        raise ValueError(f"text {file}: no such file")
    tokens = encode(task.model, file.read_text(encoding="utf-8", errors="replace"))
    offsets = [offset + index * stride for index in range(windows)]
    need = offsets[-1] + task.num_tokens
    if len(tokens) < need:
        several = f"windows {windows}, stride {stride}, " if windows > 1 else ""
        raise ValueError(
            f"text {file} has {len(tokens)} tokens; offset {offset}, {several}prompt-tokens "
            f"{task.num_prompt} and {scored} {task.num_scored} need {need}"
        )
    return [task.at(first, tokens) for first in offsets]
