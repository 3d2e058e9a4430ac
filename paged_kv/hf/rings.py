"""The rings of a cache's rows: last queries and the residual, and since which token they hold all.

A crop takes tokens back, but not what they have overwritten: `known` rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant.native import Native
from paged_kv.store.query_ring import QueryRing
from paged_kv.store.residual_ring import ResidualRing
from paged_kv.store.row_tensor import RowTensor

Tensor = torch.Tensor
T = TypeVar("T", bound="_Known")


class _Known(RowTensor):
    """known: int64 [rows], the first token that a row's ring has seen, and kept since."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.known = np.zeros(0, dtype=np.int64)

    def add_rows(self, num_rows: int) -> None:
        """Rows without a token, at the end."""
        super().add_rows(num_rows)
        self.known = np.pad(self.known, (0, num_rows))

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        super().select_rows(indices)
        self.known = self.known[indices]

    def copy(self: T) -> T:
        """One that shares nothing with this."""
        other = super().copy()
        other.known = self.known.copy()
        return other


class CacheQueries(_Known, QueryRing):
    """The last queries of a cache's rows; see QueryRing."""

    def crop(self, before: Int64s, after: Int64s) -> None:
        """Rows of `before` [rows] tokens end at `after` [rows] again."""
        kept = np.maximum(self.known, before - self.window)  # those before are overwritten
        self.known = np.where(after < before, np.minimum(after, kept), self.known)

    def state(self, num_tokens: Int64s) -> dict[str, Tensor]:
        """What restore takes: whose query lies in each column, and the queries."""
        positions = self.positions(num_tokens, self.known)
        state = {"tokens": torch.from_numpy(positions)}
        return state if self.tensor is None else {**state, "states": self.tensor}

    def restore(
        self, state: Mapping[str, Tensor], num_tokens: Int64s, device: torch.device
    ) -> None:
        """Knows these queries from now on."""
        positions = state["tokens"].numpy()
        seen = np.where(positions >= 0, positions, num_tokens[:, None])
        self.known = seen.min(1, initial=np.iinfo(np.int64).max) if self.window else num_tokens * 0
        self.num_rows = len(positions)
        if "states" in state:
            self._set(state["states"].clone().to(device))


class CacheResidual(_Known, ResidualRing):
    """The residual of a cache's rows; see ResidualRing."""

    def bind_geometry(self, geometry: Geometry) -> None:
        """The first keys have come."""
        key = Native(geometry.key_size, geometry.key_dtype)
        value = Native(geometry.value_size, geometry.value_dtype)
        layout = PageLayout(key, value, self.page_size)
        self.bind_pages(layout, geometry.num_heads, geometry.device)

    def counts(self, num_tokens: Int64s) -> Int64s:
        """int64 [rows]: how many of a row's entries, the newest, are here."""
        return (num_tokens - self.first(num_tokens, self.known)) * (self.num_pages > 0)

    def has_lost(self, before: Int64s, after: Int64s) -> bool:
        """Whether what rows had here at `after` [rows] tokens is overwritten at `before`."""
        wanted = self.first(after, np.zeros_like(after))
        return self.num_pages > 0 and bool((self.first(before, self.known) > wanted).any())

    def crop(self, before: Int64s, after: Int64s) -> None:
        """Rows of `before` [rows] tokens end at `after` again; what they overwrote stays lost."""
        kept = self.first(before, self.known)
        self.known = np.where(after < before, np.minimum(after, kept), self.known)

    def state(self, num_tokens: Int64s) -> dict[str, Tensor]:
        """What restore takes."""
        state = {"first": torch.from_numpy(self.first(num_tokens, self.known))}
        return state if self.tensor is None else {**state, "blocks": self.tensor.flatten(1, 2)}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Holds these tokens from now on. It has been bound."""
        self.known = state["first"].numpy().copy()
        self.num_rows = len(self.known)
        if "blocks" in state:
            blocks = state["blocks"].unflatten(1, (-1, self.num_pages))
            self._set(blocks.clone().to(device))
