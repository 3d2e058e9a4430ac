"""Where spilled keys and values lie: host memory first, then memory-mapped files.

    slots   0             host entries                  budget
            | host memory | file | file | file ... |

A file has no name: nothing is left of it after a crash, and nobody can shorten it. Its blocks are
reserved, so that a full disk is noticed here, and not in the middle of a write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from paged_kv.tiers.files import unnamed_file

Tensor = torch.Tensor
logger = logging.getLogger(__name__)
FIRST_ENTRIES = 256  # of host memory; it grows by half and more when that is not enough
FILE_ENTRIES = 512  # of one file


@dataclass(frozen=True)
class SpillSpace:
    """How much a sequence may spill, and where to.

    Args:
        budget: entries per layer and KV head.
        host_budget: of these, those in host memory, if there is a directory.
        directory: for the others; empty: all are in host memory.
        is_pinned: whether host memory is page-locked, for copies to a GPU.
    """

    budget: int
    host_budget: int
    directory: str = ""
    is_pinned: bool = False

    @property
    def host_entries(self) -> int:
        """The most in host memory."""
        return min(self.budget, self.host_budget) if self.directory else self.budget


class SpillMemory:
    """Keys and values in slots [0, capacity), which grows.

    Args:
        shape: (layers, KV heads).
        sizes: numbers of an entry, by name.
        dtype: of the numbers.
        space: see SpillSpace.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sizes: dict[str, int],
        dtype: torch.dtype,
        space: SpillSpace,
    ) -> None:
        self.shape, self.sizes, self.dtype, self.space = shape, sizes, dtype, space
        # [layers, kv_heads, entries, size] by name: host memory, then a part for each file.
        self._parts = [{name: self._host(size, 0) for name, size in sizes.items()}]
        self._disk_is_full = False

    @property
    def capacity(self) -> int:
        """Entries that there is room for, per layer and KV head."""
        return sum(next(iter(part.values())).shape[2] for part in self._parts)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Of host memory, and of files."""
        host, *files = (sum(tensor.nbytes for tensor in part.values()) for part in self._parts)
        return host, sum(files)

    def grow(self, wanted: int) -> int:
        """Makes room for so many entries, as far as possible; how many there is room for."""
        wanted = min(wanted, self.space.budget)
        length = next(iter(self._parts[0].values())).shape[2]
        if length < wanted and length < self.space.host_entries:
            size = min(self.space.host_entries, max(wanted * 3 // 2, FIRST_ENTRIES))
            for name, old in self._parts[0].items():
                new = self._host(self.sizes[name], size)
                new[:, :, :length] = old
                self._parts[0][name] = new
        while self.capacity < wanted and not self._disk_is_full:
            try:
                count = min(FILE_ENTRIES, self.space.budget - self.capacity)
                self._parts.append(self._file(count))
            except OSError as error:
                self._disk_is_full = True
                logger.warning(
                    "spill_dir %s: %s; the least important spilled entries are lost from now on",
                    self.space.directory,
                    error,
                )
        return min(self.capacity, self.space.budget)

    def read(self, name: str, row: Tensor, slot: Tensor) -> Tensor:
        """[..., size]: what lies in slots; row = layer * KV heads + head, of the slots' shape."""
        result: Tensor | None = None
        for part, start, inside in self._of(slot):
            buffer = part[name]  # once: another thread may put a larger one in its place
            index = (row * buffer.shape[2] + slot - start)[inside]
            entries = buffer.flatten(0, 2).index_select(0, index.flatten())
            if inside is Ellipsis:
                return entries.view(*slot.shape, self.sizes[name])
            if result is None:
                result = torch.empty(*slot.shape, self.sizes[name], dtype=self.dtype)
            result[inside] = entries
        assert result is not None
        return result

    def write(self, name: str, row: Tensor, slot: Tensor, numbers: Tensor) -> None:
        """Stores numbers [n, size] in distinct slots [n]; see read."""
        for part, start, inside in self._of(slot):
            index = (row * part[name].shape[2] + slot - start)[inside]
            part[name].flatten(0, 2).index_copy_(0, index, numbers[inside].to(self.dtype))

    def _of(self, slot: Tensor) -> Iterator[tuple[dict[str, Tensor], int, Any]]:
        """Each part that has some of the slots, its first slot, and an index of those slots."""
        start = 0
        for part in self._parts:
            end = start + next(iter(part.values())).shape[2]
            inside = (slot >= start) & (slot < end)
            if len(self._parts) == 1 or bool(inside.all()):
                yield part, start, ...
                return
            if bool(inside.any()):
                yield part, start, inside
            start = end

    def _host(self, size: int, num_entries: int) -> Tensor:
        shape = (*self.shape, num_entries, size)
        return torch.empty(shape, dtype=self.dtype, pin_memory=self.space.is_pinned)

    def _file(self, num_entries: int) -> dict[str, Tensor]:
        """Room for more entries in a file. Raises OSError: there is none."""
        numbers = [
            self.shape[0] * self.shape[1] * num_entries * size for size in self.sizes.values()
        ]
        with unnamed_file(self.space.directory, sum(numbers) * self.dtype.itemsize) as file:
            path = f"/proc/self/fd/{file.fileno()}"  # the mapping outlives the descriptor
            mapped = torch.from_file(path, shared=True, size=sum(numbers), dtype=self.dtype)
        parts = zip(self.sizes.items(), mapped.split(numbers), strict=True)
        return {name: part.view(*self.shape, num_entries, size) for (name, size), part in parts}
