"""What is added up while a cache lives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass
class Counters:
    """What is added up while a cache lives."""

    evicted: int = 0
    compactions: int = 0
    shrunk: int = 0
    shrunk_entries: int = 0
    peak_bytes: int = 0
    fetched: float = 0.0
    merged: list[torch.Tensor] = field(default_factory=list)  # scalars, read when asked for

    @property
    def num_merged(self) -> float:
        """Tokens that went into other entries."""
        if len(self.merged) > 1:
            self.merged[:] = [torch.stack(self.merged).sum()]
        return float(self.merged[0]) if self.merged else 0.0

    def copy(self) -> Counters:
        """Goes on by itself."""
        return replace(self, merged=list(self.merged))

    def note_bytes(self, num_bytes: int) -> None:
        """Keys and values take so many now."""
        self.peak_bytes = max(self.peak_bytes, num_bytes)
