"""What copies and files need of a PagedCache, which is made of them: a Protocol, not the class."""

from __future__ import annotations

from typing import Any, Protocol

from paged_kv.config import CompressionConfig
from paged_kv.hf.pool import PagePool
from paged_kv.hf.sequences import Sequences


class CacheState(Protocol):
    """What a PagedCache holds; see there."""

    compression: CompressionConfig
    pool: PagePool
    sequences: Sequences
    layers: list[Any]
    progress: list[int]
    _config: Any
    _attention: str
    _owner: Any
    _padded_at: int

    def _check_open(self) -> None:
        """Raises ValueError: it has been closed, or interrupted by an error."""

    def _others(self) -> list[Any]:
        """Layers that are not paged."""

    def close(self) -> None:
        """Gives all pages back."""
