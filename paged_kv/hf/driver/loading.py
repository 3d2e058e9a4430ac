"""A model and its tokenizer from a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_model(directory: Path) -> Any:
    """The causal LM of a directory in float32, for inference."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def encode(directory: Path, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokens
