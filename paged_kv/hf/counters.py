"""What is added up while a cache lives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass
class Counters:
    """What is added up while a cache lives."""

    evicted: int = 0
    compactions: int = 0
    peak_bytes: int = 0
    merged: list[torch.Tensor] = field(default_factory=list)  # scalars, read when asked for
    fetched: list[torch.Tensor] = field(default_factory=list)  # the same

    @property
    def num_merged(self) -> float:
        """Tokens that went into other entries."""
        return _sum(self.merged)

    @property
    def num_fetched(self) -> float:
        """Entries that came back."""
        return _sum(self.fetched)

    def copy(self) -> Counters:
        """Goes on by itself."""
        return replace(self, merged=list(self.merged), fetched=list(self.fetched))

    def note_bytes(self, num_bytes: int) -> None:
        """Keys and values take so many now."""
        self.peak_bytes = max(self.peak_bytes, num_bytes)


def _sum(scalars: list[torch.Tensor]) -> float:
    """Of all; leaves one in their place."""
    if len(scalars) > 1:
        scalars[:] = [torch.stack(scalars).sum()]
    return float(scalars[0]) if scalars else 0.0
