"""Swap tiers of small slots, for tests of what they keep and of disks that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paged_kv.tiers.swap_tiers import SwapTiers

SLOT = 5000  # no power of two, and no multiple of a disk's block


@contextmanager
def swap_tiers(directory: Path) -> Iterator[SwapTiers]:
    """16 slots of host memory and 32 of a file, of which nothing is left."""
    made = SwapTiers(SLOT, host_slots=16, file_slots=32, directory=str(directory))
    yield made
    made.close()
    assert not list(directory.iterdir())


def fill(tiers: SwapTiers, slots: Any, seed: int) -> torch.Tensor:
    """Random bytes in these host slots; returns them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (len(slots), SLOT), dtype=torch.uint8, generator=generator)
    tiers.host[list(slots)] = data
    return data


def opened(tiers: SwapTiers) -> Path:
    """Its file, which has no name, by the descriptor: it can be opened once more."""
    return Path(f"/proc/self/fd/{tiers._file.fd}")
