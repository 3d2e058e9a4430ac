"""What a cache holds, and what it has given up."""

from __future__ import annotations

from dataclasses import dataclass

from paged_kv.hf.rows import Rows


@dataclass(frozen=True)
class CacheStats:
    """A snapshot.

    Entries are counted per layer and sequence: one stands for a token in all KV heads.

    Args:
        sequences: rows.
        tokens: processed, over all rows.
        pages: held; one that sequences share counts once.
        entries: held, over all layers and rows.
        evicted: entries dropped so far.
        merged: tokens that went into other entries so far (mean over KV heads).
        spilled: entries that are on a lower tier.
        fetched: entries that came back from there, or that a compaction spared for having more
            attention than a survivor, so far (mean over KV heads).
        compactions: times that a layer of a sequence gave up entries.
        shrunk: sequences that gave up all above their budgets when pages ran out, so far.
        shrunk_entries: entries that they dropped then; part of evicted.
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
    shrunk: int
    shrunk_entries: int
    page_format: str
    bytes_by_tier: dict[str, int]
    side_bytes: int
    peak_bytes: int

    @property
    def bytes(self) -> int:
        """Keys and values held on the device."""
        return self.bytes_by_tier["device"]


def snapshot(rows: Rows, marks_bytes: int) -> CacheStats:
    """What a cache holds, and what it has given up.

    Args:
        rows: of the cache.
        marks_bytes: memory of what crop must have again.
    """
    tables, counters = rows.tables, rows.counters
    num_bytes, side_bytes = tables.num_bytes
    return CacheStats(
        sequences=rows.num_rows,
        tokens=int(rows.num_tokens.sum()),
        pages=tables.num_pages,
        entries=int(rows.size.sum()),
        evicted=counters.evicted,
        merged=counters.num_merged,
        spilled=sum(store.num_entries for store in rows.spilled.stores),
        fetched=counters.fetched,
        compactions=counters.compactions,
        shrunk=counters.shrunk,
        shrunk_entries=counters.shrunk_entries,
        page_format=rows.page_format,
        bytes_by_tier={"device": num_bytes + rows.residual.num_bytes, **rows.spilled.num_bytes},
        side_bytes=side_bytes + rows.ring.num_bytes + marks_bytes,
        peak_bytes=counters.peak_bytes,
    )
