"""Text to tokens: prompts, and conversations in a model's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Message = dict[str, str]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises ValueError: it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model {directory}: no tokenizer can be loaded ({reason})") from None


class Conversation:
    """Turns of a user and a model, as tokens that only ever grow at the end, if that is possible.

    The tokens of a turn begin with those that the model has read and written before, so that its
    cache can be used again. Where the template shows earlier turns in another way than they were
    written (some leave out what a model thought), all is encoded anew.

    Args:
        tokenizer: see load_tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the model has no chat template: use prompt instead of chat")
        self.tokenizer = tokenizer
        self.messages: list[Message] = []
        self.tokens: list[int] = []

    def ask(self, text: str) -> list[int]:
        """The tokens of the conversation up to where the model's answer to `text` begins."""
        self.messages.append({"role": "user", "content": text})
        shown = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False
        )
        before = self._decode(self.tokens, skip_special_tokens=False)
        known = self.tokens if shown.startswith(before) else []
        suffix = shown[len(before) :] if known else shown
        self.tokens = known + list(self.tokenizer.encode(suffix, add_special_tokens=False))
        return list(self.tokens)

    def answered(self, tokens: list[int]) -> None:
        """Takes in what the model wrote, with its end token if it wrote one."""
        self.tokens += tokens
        text = self._decode(tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})

    def _decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text
