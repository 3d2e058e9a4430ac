"""What the swap needs of the scheduler and of a worker: it imports neither of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.store.pages import Pages


@runtime_checkable
class Compressed(Protocol):
    """A manager of a layer group that gives pages back by a schedule."""

    def evicted(self, request_id: str, num_tokens: int) -> int:
        """Entries of a request that are dropped after so many tokens."""

    def has_scores(self, request_id: str) -> bool:
        """Whether what lies beside a request's pages depends on its queries."""

    def forget_restored(self, request_id: str) -> None:
        """The request does not get its pages back."""


class RingRows(Protocol):
    """Which row of some rings each request has.

    Args:
        first_token: int64 [rows], the first token that each row knows.
    """

    first_token: npt.NDArray[np.int64]

    def row_of(self, request: str) -> int | None:
        """The row of a request; None: it has none."""

    def resume(self, request: str, first_token: int) -> None:
        """A request that is resumed in the coming step gets its old row's contents back."""


class SpilledEntries(Protocol):
    """What requests have spilled."""

    def keep(self, request: str) -> None:
        """Its pages are kept while it is preempted: so is what it spilled."""

    def drop(self, request: str) -> None:
        """The request is gone, or its pages are."""


class LayerCaches(Protocol):
    """The caches of a worker's layers, those of a metadata builder at a time."""

    def raw(self, names: tuple[str, ...]) -> Sequence[torch.Tensor]:
        """[layers, pages, ...] of equal neighbours, as they lie in memory."""

    def pages(self, names: tuple[str, ...]) -> Sequence[Pages]:
        """The same as keys and values."""

    def side(self, names: tuple[str, ...]) -> Sequence[torch.Tensor]:
        """[layers, pages, ...], what lies beside them."""

    def layer(self, name: str) -> Any:
        """vLLM's Attention layer."""
