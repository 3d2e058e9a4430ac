"""Greedy decoding by hand, one forward pass per step, so that every step can be timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paged_kv.hf import compat

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(directory: Path, dtype: str) -> Any:
    """The causal LM of a directory, for inference, in one of DTYPES."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], local_files_only=True
    ).eval()


def dynamic_cache(model: Any) -> Any:
    """What generate() uses by itself."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


class Decoder:
    """Rows of tokens that grow by one in each step.

    Args:
        model: a causal LM.
        cache: of this model, empty; None to compute everything anew in every step.
        chunk: tokens per row that `read` processes at once.
    """

    def __init__(self, model: Any, cache: Any = None, chunk: int = 512) -> None:
        self.model, self.cache, self.chunk = model, cache, chunk

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Processes all tokens of each row but the last; rows of one length."""
        self.tokens = torch.tensor(rows, device=self.model.device)
        if self.cache is not None:
            for part in self.tokens[:, :-1].split(self.chunk, -1):
                self._forward(part)

    @torch.inference_mode()
    def step(self) -> float:
        """Adds a token to each row; the seconds that took."""
        start = time.perf_counter()
        inputs = self.tokens if self.cache is None else self.tokens[:, -1:]
        new = self._forward(inputs).argmax(-1)
        if new.is_cuda:  # what was only launched has not been done yet
            torch.cuda.synchronize(new.device)
        seconds = time.perf_counter() - start
        self.tokens = torch.cat([self.tokens, new], -1)
        return seconds

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the last token of each row, [rows, 1, vocabulary]."""
        used = {} if self.cache is None else {compat.cache_argument(): self.cache}
        logits: torch.Tensor = self.model(
            tokens, use_cache=self.cache is not None, logits_to_keep=1, **used
        ).logits
        return logits


def interleaved(decoders: Mapping[str, Decoder], steps: int) -> dict[str, list[float]]:
    """Each decoder steps in turn; the seconds of each one's steps."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(steps):
        for name, decoder in decoders.items():
            seconds[name].append(decoder.step())
    return seconds
