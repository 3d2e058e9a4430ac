"""One sequence in transformers with a PagedCache, read in the chunks that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from paged_kv.config import CompressionConfig
from paged_kv.hf import compat
from paged_kv.hf.cache import PagedCache
from paged_kv.hf.driver.loading import load_model


class Reader:
    """A model in float32 and the cache of one sequence.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: Path) -> None:
        self.model = load_model(directory)
        self.cache: Any = None

    def use(self, config: CompressionConfig, page_size: int) -> None:
        """What the next sequences keep. Raises ValueError: see PagedCache."""
        if self.cache is not None:
            self.cache.close()
        self.cache = PagedCache(self.model.config, config, page_size=page_size)

    def begin(self) -> None:
        """The next sequence."""
        self.cache.reset()

    def read(self, tokens: Sequence[int]) -> int:
        """The token that most likely follows; one forward pass."""
        return int(self._logits(tokens, 1)[-1].argmax())

    def loss(self, tokens: Sequence[int]) -> float:
        """Sum of -log p of all tokens but the first, in nats, as one pass predicts them.

        The last one is not processed.
        """
        logits = self._logits(tokens[:-1], 0).float()
        wanted = torch.tensor(list(tokens[1:]), device=logits.device)
        return F.cross_entropy(logits, wanted, reduction="sum").item()

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        """[n, vocabulary] of the last tokens; 0 for all."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        used = {compat.cache_argument(): self.cache}
        logits: torch.Tensor = self.model(ids, use_cache=True, logits_to_keep=last, **used).logits
        return logits[0]
