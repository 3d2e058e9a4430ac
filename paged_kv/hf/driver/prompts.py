"""Prompts of two parts: what is compressed, and what is asked after that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paged_kv.hf.driver.conversation import load_tokenizer

_CUT = "\x00cut\x00"  # in no text


class PromptEncoder:
    """A model's tokenizer, and what ends its answers.

    Args:
        directory: of the model.

    Raises:
        ValueError: it has no tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.stop = _ends(directory, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return tokens

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def parts(
        self, context: str, question: str, answer_prefix: str, chat: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens up to the end of the context, and those after it.

        Args:
            context: a text.
            question: what the user goes on with.
            answer_prefix: how the answer begins.
            chat: whether both are a turn in the model's chat template, if it has one.
        """
        if not (chat and self.tokenizer.chat_template):
            begin = list(self.tokenizer(context, verbose=False).input_ids)
            return begin, self.encode(question + answer_prefix)
        turn = [{"role": "user", "content": context + _CUT + question}]
        text: str = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        first, _, last = text.partition(_CUT)
        return self.encode(first), self.encode(last + answer_prefix)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _ends(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, as generate() would have it."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    if (directory / "generation_config.json").exists():
        named = GenerationConfig.from_pretrained(directory).eos_token_id
        found |= set(named if isinstance(named, list) else [named])
    return frozenset(found - {None})
