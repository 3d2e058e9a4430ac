"""Policies around another one: that says what goes, they what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paged_kv.policies.base import Policy
from paged_kv.policies.written import Written

Tensor = torch.Tensor


class Wrapper(Policy):
    """A policy around an evicting one, which its option `of` names.

    A subclass declares `of` and adds to `reads` what it reads itself.

    Args:
        inner: says what goes.
        options: see Policy.
    """

    wraps = True

    def __init__(self, inner: Policy, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner.num_sink_tokens, inner.recent_window, options)
        self.inner = inner
        self.reads = type(self).reads | inner.reads
        self.query_statistics = inner.query_statistics

    @property
    def observation_window(self) -> int:
        """The inner policy's."""
        return self.inner.observation_window

    @property
    def score_decay(self) -> float | None:
        """The inner policy's."""
        return self.inner.score_decay

    @property
    def kernel_decay(self) -> float | None:
        """The inner policy's, whose scores they are."""
        return None if self._accumulates else self.inner.kernel_decay

    def accumulate(self, scores: Tensor, probabilities: Tensor, positions: Tensor) -> Tensor:
        """The inner policy's."""
        return self.inner.accumulate(scores, probabilities, positions)

    def rate(self, entries: Written) -> Tensor:
        """The inner policy's."""
        return self.inner.rate(entries)

    @property
    def scores_key(self) -> Any:
        """The inner policy's, whose scores they are."""
        return super().scores_key if self._accumulates else self.inner.scores_key

    @property
    def _accumulates(self) -> bool:
        """Whether a subclass has scores of its own."""
        return type(self).accumulate is not Wrapper.accumulate
