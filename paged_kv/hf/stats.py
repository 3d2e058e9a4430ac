"""What a cache holds, and what it has given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from paged_kv.hf.sequences import Sequences


@dataclass(frozen=True)
class CacheStats:
    """A snapshot.

    Entries are counted per layer and sequence: one stands for a token in all KV heads.

    Args:
        sequences: rows.
        tokens: processed, over all sequences.
        pages: held; one that sequences share counts once.
        entries: held, over all layers and sequences.
        evicted: entries dropped so far.
        merged: tokens that went into other entries so far (mean over KV heads).
        spilled: entries that are on a lower tier.
        compactions: times that a layer of a sequence gave up entries.
        page_format: how pages store numbers; see CompressionConfig.
        bytes_by_tier: of the keys and values held, scales and residual included.
        side_bytes: of what policies keep beside them: positions, scores, weights, last queries.
        peak_bytes: the most that keys and values took at once.
    """

    sequences: int
    tokens: int
    pages: int
    entries: int
    evicted: int
    merged: float
    spilled: int
    compactions: int
    page_format: str
    bytes_by_tier: dict[str, int]
    side_bytes: int
    peak_bytes: int

    @property
    def bytes(self) -> int:
        """Keys and values held on the device."""
        return self.bytes_by_tier["device"]


@dataclass
class Counters:
    """What is added up while a cache lives."""

    evicted: int = 0
    compactions: int = 0
    peak_bytes: int = 0
    merged: list[torch.Tensor] = field(default_factory=list)  # scalars, read when asked for

    @property
    def num_merged(self) -> float:
        """Tokens that went into other entries."""
        if len(self.merged) > 1:
            self.merged = [torch.stack(self.merged).sum()]
        return float(self.merged[0]) if self.merged else 0.0

    def note_bytes(self, num_bytes: int) -> None:
        """Keys and values take so many now."""
        self.peak_bytes = max(self.peak_bytes, num_bytes)


def snapshot(sequences: Sequences) -> CacheStats:
    """What a cache holds, and what it has given up."""
    tables, counters = sequences.tables, sequences.counters
    num_bytes, side_bytes = tables.num_bytes
    return CacheStats(
        sequences=sequences.num_rows,
        tokens=int(sequences.num_tokens.sum()),
        pages=tables.num_pages,
        entries=int(sequences.size.sum()),
        evicted=counters.evicted,
        merged=counters.num_merged,
        spilled=0,
        compactions=counters.compactions,
        page_format=sequences.page_format,
        bytes_by_tier={"device": num_bytes + sequences.residual.num_bytes, "host": 0, "mmap": 0},
        side_bytes=side_bytes + sequences.ring.num_bytes,
        peak_bytes=counters.peak_bytes,
    )
