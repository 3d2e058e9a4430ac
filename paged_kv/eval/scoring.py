"""The loss of predictions, and how far they are from those of the full cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_kv.hf.seams import logits_of

MOST_ROWS = 256  # of logits at once: vocabularies are large


class Score:
    """Sums over the targets of a window, which come in parts and in order.

    Args:
        model: see load_model.
        full: the last hidden states [targets, hidden] that predict them from the full cache. Their
            logits are computed again when they are needed: kept, they would take a hundred times
            the memory. None for the full cache itself, whose hidden states are recorded.
    """

    def __init__(self, model: Any, full: Tensor | None = None) -> None:
        self.model, self.full = model, full
        self.count, self.nll, self.seconds_of_kl = 0, 0.0, 0.0
        self.kl = 0.0  # nats, as nll
        self._recorded: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        """[targets, hidden] as recorded."""
        return torch.cat(self._recorded)

    @torch.inference_mode()
    def add(self, hidden: Tensor, targets: Any) -> None:
        """Counts the next part.

        Args:
            hidden: [n, hidden]; see ReferenceEngine.process.
            targets: n tokens.
        """
        if self.full is None:
            self._recorded.append(hidden.clone())  # a slice would hold all that it was cut from
        wanted = torch.tensor(list(targets), device=hidden.device)
        for rows, labels in _pairs(hidden, wanted):
            logits = logits_of(self.model, rows).float()
            self.nll += F.cross_entropy(logits, labels, reduction="sum").item()
            if self.full is not None:
                start = time.perf_counter()
                full = logits_of(self.model, self.full[self.count : self.count + len(rows)])
                self.kl += divergence(full.float(), logits)
                self.seconds_of_kl += time.perf_counter() - start
            self.count += len(rows)


def divergence(full: Tensor, logits: Tensor) -> float:
    """Sum over n of KL(full || other), in nats, of logits [n, vocabulary]."""
    full, other = full.log_softmax(-1), logits.log_softmax(-1)
    each = F.kl_div(other, full, reduction="none", log_target=True).sum(-1)
    return each.double().sum().item()


def _pairs(hidden: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(MOST_ROWS), wanted.split(MOST_ROWS), strict=True)
