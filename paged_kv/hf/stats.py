"""What a cache holds, and what it has given up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        fetched: entries that came back from there, or that a compaction spared for having more
            attention than a survivor, so far (mean over KV heads).
        compactions: times that a layer of a sequence gave up entries.
        page_format: how pages store numbers; see CompressionConfig.
        bytes_by_tier: of the keys and values held, scales and residual included; on host and mmap
            the memory that spilled entries have taken.
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
    fetched: float
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


def snapshot(sequences: Sequences) -> CacheStats:
    """What a cache holds, and what it has given up."""
    tables, counters = sequences.tables, sequences.counters
    num_bytes, side_bytes = tables.num_bytes
    stores = sequences.spilled.stores
    lower = {tier: sum(one.num_bytes[tier] for one in stores) for tier in ("host", "mmap")}
    return CacheStats(
        sequences=sequences.num_rows,
        tokens=int(sequences.num_tokens.sum()),
        pages=tables.num_pages,
        entries=int(sequences.size.sum()),
        evicted=counters.evicted,
        merged=counters.num_merged,
        spilled=sum(store.num_entries for store in stores),
        fetched=counters.num_fetched,
        compactions=counters.compactions,
        page_format=sequences.page_format,
        bytes_by_tier={"device": num_bytes + sequences.residual.num_bytes, **lower},
        side_bytes=side_bytes + sequences.ring.num_bytes + sequences.marks.num_bytes,
        peak_bytes=counters.peak_bytes,
    )


def _sum(scalars: list[torch.Tensor]) -> float:
    """Of all; leaves one in their place."""
    if len(scalars) > 1:
        scalars[:] = [torch.stack(scalars).sum()]
    return float(scalars[0]) if scalars else 0.0
