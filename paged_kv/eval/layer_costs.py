"""What page formats of single layers do to a model's predictions of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.eval.reference.packing import Packing
from paged_kv.hf.driver.loading import load_model

ROWS = 128  # of logits at once


class Measured(NamedTuple):
    """One choice of formats on the text."""

    nll: float  # mean over the tokens, in nats
    divergence: float  # from native pages, the same
    bytes_per_token: float  # all layers, as stored


class Costs:
    """A model and a text, read with native pages.

    Args:
        directory: of the model.
        tokens: the text, at least 2.

    Raises:
        ValueError: the model is unsupported.
    """

    def __init__(self, directory: Path, tokens: Sequence[int]) -> None:
        self.model, self.tokens = load_model(directory), list(tokens)
        engine = self._engine({})
        self.num_layers = len(engine.layers)
        hidden = engine.process(self.tokens[:-1])
        self._native = [self._predict(engine, rows) for rows in hidden.split(ROWS)]

    def _engine(self, formats: Mapping[int, str]) -> ReferenceEngine:
        engine = ReferenceEngine(self.model, CompressionConfig())
        for layer, name in formats.items():
            engine.layers[layer].packing = Packing(name, page_size=DEFAULT_PAGE_SIZE)
        return engine

    @staticmethod
    def _predict(engine: ReferenceEngine, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, float32 [rows, vocabulary]."""
        return engine.logits(hidden).float().log_softmax(-1)

    @torch.inference_mode()
    def of(self, formats: Mapping[int, str]) -> Measured:
        """The text with these formats by layer, all others native.

        Each token reads all entries as they are stored, its own included, so that one pass is what
        token after token would be.

        Raises:
            ValueError: a format that the model's layers cannot have.
        """
        engine = self._engine(formats)
        hidden = engine.process(self.tokens[:-1])
        loss = divergence = 0.0
        wanted = torch.tensor(self.tokens[1:], device=hidden.device).split(ROWS)
        for rows, native, targets in zip(hidden.split(ROWS), self._native, wanted, strict=True):
            log_probs = self._predict(engine, rows)
            loss -= log_probs.gather(1, targets[:, None]).sum().item()
            divergence += (native.exp() * (native - log_probs)).sum().item()
        count = len(self.tokens) - 1
        return Measured(loss / count, divergence / count, engine.cache_bytes / count)
