"""What one layer of one sequence holds, in contiguous buffers."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


class LayerCache:
    """Fields by name (keys, values, positions, weights, scores), each [kv_heads, entries, ...].

    Entries are in no order: a compaction closes the gaps, new ones come at the end. Buffers begin
    with what is needed, as a compaction leaves them: fields are contiguous. They grow by half as
    much again; copies share them until they take more.
    """

    def __init__(self) -> None:
        self.size = 0
        self._buffers: dict[str, Tensor] = {}
        self._is_shared = False

    def __getitem__(self, name: str) -> Tensor:
        """A field's entries: a view."""
        return self._buffers[name][:, : self.size]

    def append(self, num_new: int, **fields: Tensor) -> None:
        """Adds entries; every field, each broadcasting to [kv_heads, num_new, ...]."""
        end = self.size + num_new
        room = next(iter(self._buffers.values())).shape[1] if self._buffers else 0
        if self._is_shared or end > room:
            self._grow(end, fields)
            self._is_shared = False
        for name, new in fields.items():
            self._buffers[name][:, self.size : end] = new
        self.size = end

    def replace(self, size: int, **fields: Tensor) -> None:
        """Holds these entries instead, [kv_heads, size, ...] of every field."""
        self.size, self._buffers, self._is_shared = size, fields, False

    def _grow(self, needed: int, fields: dict[str, Tensor]) -> None:
        """Amortised: half as much again, but the first time."""
        heads, room = len(fields["keys"]), needed + needed // 2 if self._buffers else needed
        for name, new in fields.items():
            buffer = new.new_empty(heads, room, *new.shape[2:])
            if name in self._buffers:
                buffer[:, : self.size] = self[name]
            self._buffers[name] = buffer

    def copy(self, **fields: str) -> LayerCache:
        """One that goes on by itself.

        Args:
            fields: name in the copy -> name here; none for all as they are.
        """
        other = LayerCache()
        other.size = self.size
        names = fields or {name: name for name in self._buffers}
        other._buffers = {name: self._buffers[there] for name, there in names.items()}
        other._is_shared = self._is_shared = True
        return other


class Window:
    """The last queries of one layer: a ring.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ring: Tensor | None = None

    def append(self, queries: Tensor, start: int) -> None:
        """Takes [heads, n, head_dim], at positions start, start + 1, ..."""
        if not self.size:
            return
        heads, num_new, head_dim = queries.shape
        if self._ring is None:
            self._ring = queries.new_zeros(heads, self.size, head_dim)
        if num_new == 1:  # by far the most frequent: a slice is written faster than indices
            self._ring[:, start % self.size] = queries[:, 0]
            return
        last = min(num_new, self.size)
        positions = torch.arange(start + num_new - last, start + num_new, device=queries.device)
        self._ring[:, positions % self.size] = queries[:, num_new - last :]

    def last(self, positions: Tensor) -> Tensor:
        """Queries at these positions (int64 [w], of the last `size`): [heads, w, head_dim]."""
        assert self._ring is not None, "no query yet"
        return self._ring[:, positions % self.size]

    def copy(self) -> Window:
        """One that shares nothing with this."""
        other = Window(self.size)
        other._ring = None if self._ring is None else self._ring.clone()
        return other
