"""Host memory for swapped pages: one block, taken at the start, never more."""

from __future__ import annotations

import torch
from torch import Tensor

GIB = 1 << 30


def allocate(num_slots: int, slot_bytes: int, pin: bool) -> Tensor:
    """Committed memory, uint8 [num_slots, slot_bytes]; page-locked if pin, for copies from a GPU.

    Raises:
        ValueError: the machine has no room for it; names kv-swap-space.
    """
    size = num_slots * slot_bytes
    available = available_bytes()
    # Linux promises more than it has: who takes it at its word is killed when the pages are used.
    if available is not None and size > available:
        raise ValueError(
            f"kv-swap-space: {size / GIB:.2f} GiB of host memory are asked for (in this process), "
            f"{available / GIB:.2f} GiB are available"
        )
    try:
        slots = torch.empty(num_slots, slot_bytes, dtype=torch.uint8, pin_memory=pin)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"kv-swap-space: no {size / GIB:.2f} GiB to be had: {reason}") from None
    return slots.zero_()  # every page of it is the process's own from here on


def available_bytes() -> int | None:
    """Host memory that can be used without swapping to disk; None where Linux does not say."""
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return int(sizes["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return None
