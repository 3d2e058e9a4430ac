"""What a process holds of the machine's memory, and of a disk's room."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(directory: Path) -> int:
    """Of the disk that the directory lies on."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize
