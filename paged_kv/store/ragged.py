"""Rows of different lengths, one behind the other: host arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.policies.base import Int64s


def ragged(counts: Int64s) -> tuple[Int64s, Int64s]:
    """(row, place in the row) of each of counts.sum() items."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device; nobody waits for it.

    A copy to a GPU is one from pinned memory, which PyTorch does not give to anybody else before it
    has been read: steps may be in flight.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type not in ("cpu", "mps"):  # these share the host's memory
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
