"""The last queries of each row, for policies that look at them before a compaction."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.policies.region import Queries

Tensor = torch.Tensor


class QueryRing:
    """The last `window` queries of each layer and row; token t lies in column t % window.

    Args:
        num_layers: layers.
        window: how many; may be 0.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        self.num_layers, self.window = num_layers, window
        self.states: Tensor | None = None  # [layers, rows, window, heads, head_dim]
        self.tokens = np.full((0, window), -1, dtype=np.int64)  # whose query it is; -1: nobody's

    @property
    def num_bytes(self) -> int:
        """Of the states."""
        return 0 if self.states is None else self.states.numel() * self.states.element_size()

    def add_rows(self, num_rows: int) -> None:
        """Rows without a query, at the end."""
        self.tokens = np.pad(self.tokens, ((0, num_rows), (0, 0)), constant_values=-1)
        if self.states is not None:
            size = (self.num_layers, num_rows, *self.states.shape[2:])
            self.states = torch.cat([self.states, self.states.new_zeros(size)], 1)

    def select_rows(self, indices: Int64s) -> None:
        """Row i is what row indices[i] was."""
        self.tokens = self.tokens[indices]
        if self.states is not None and not np.array_equal(indices, np.arange(len(self.tokens))):
            index = torch.from_numpy(indices).to(self.states.device)
            self.states = self.states.index_select(1, index)

    def copy(self) -> QueryRing:
        """One that shares nothing with this."""
        other = copy.copy(self)
        other.tokens = self.tokens.copy()
        other.states = None if self.states is None else self.states.clone()
        return other

    def state(self) -> dict[str, Tensor]:
        """What restore takes."""
        state = {"tokens": torch.from_numpy(self.tokens.copy())}
        return state if self.states is None else {**state, "states": self.states}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Knows these queries from now on."""
        self.tokens = state["tokens"].numpy().copy()
        if "states" in state:
            self.states = state["states"].clone().to(device)

    def crop(self, num_tokens: Int64s) -> None:
        """Forgets the queries of tokens from num_tokens [rows] on."""
        self.tokens[self.tokens >= num_tokens[:, None]] = -1

    def note(self, num_tokens: Int64s, counts: Int64s) -> None:
        """counts [rows] tokens come to those before, num_tokens [rows]; write follows."""
        if not self.window:
            return
        ends = (num_tokens + counts)[:, None]
        newest = ends - 1 - (ends - 1 - np.arange(self.window)) % self.window
        fresh = (newest >= num_tokens[:, None]) & (newest >= 0)
        self.tokens = np.where(fresh, newest, self.tokens)

    def write(self, layer: int, row: int, num_tokens: Int64s, query: Tensor) -> None:
        """The queries of new tokens in a layer.

        Args:
            layer: index among the layers here.
            row: the first of the rows.
            num_tokens: int64 [rows], tokens before the new ones.
            query: [rows, heads, q, head_dim], after RoPE.
        """
        num_rows, heads, num_queries, size = query.shape
        if self.states is None:
            shape = (self.num_layers, len(self.tokens), self.window, heads, size)
            self.states = query.new_zeros(shape)
        last = min(num_queries, self.window)
        tokens = num_tokens[:, None] + np.arange(num_queries - last, num_queries)
        columns = torch.from_numpy(tokens % self.window).to(query.device)
        rows = torch.arange(row, row + num_rows, device=query.device)[:, None]
        newest = query[:, :, num_queries - last :].transpose(1, 2)
        self.states[layer][rows, columns] = newest.to(self.states.dtype)

    def queries(
        self,
        layers: Int64s,
        rows: Int64s,
        kv_heads: int,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Queries | None:
        """The observation windows of some rows in some layers, as a policy sees them."""
        if not self.window:
            return None
        assert self.states is not None, "no query yet"
        device = self.states.device
        index = torch.from_numpy(layers).to(device)[:, None], torch.from_numpy(rows).to(device)
        states = self.states[index].unflatten(-2, (kv_heads, -1)).float()
        positions = torch.from_numpy(self.tokens[rows]).to(device)
        return Queries(states.movedim(-4, -2), positions, scale, softcap, sinks)
