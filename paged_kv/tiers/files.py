"""Files without a name, and in them slots for swapped pages.

    slot 0 | slot 1 | slot 2 | ...

A file without a name is gone when its process is, however that ends: vLLM kills its workers, and
nobody else can open, find or forget to remove it. All its room is taken at the start.

Slots are read and written at offsets, not through a mapping: where a disk fails, a read of a
mapping kills the process (SIGBUS), and pread returns fewer bytes or an error.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from typing import BinaryIO

from paged_kv.tiers.host import GIB


class BadSlot(OSError):
    """A slot does not hold what was written to it."""


def unnamed_file(directory: str, num_bytes: int) -> BinaryIO:
    """A file of so many bytes, without a buffer; its room on the disk is taken.

    Raises:
        OSError: the directory is missing or cannot be written, or its disk has no room.
    """
    # O_TMPFILE where the file system has it: it never had a name. Elsewhere it loses it at once.
    file: BinaryIO = tempfile.TemporaryFile(buffering=0, dir=directory)  # noqa: SIM115  returned
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError:
        file.close()
        raise
    return file


def check_spill_dir(directory: str) -> None:
    """Refuses a spill_dir that cannot be written; an empty one is none. Raises ValueError."""
    if not directory:
        return
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(
            f"spill_dir must be a directory to write to, not {directory!r}: {error.strerror}"
        ) from None


class SwapFile:
    """num_slots slots of slot_bytes in a file of their own, in a directory that others may share.

    Raises:
        ValueError: the directory is missing or cannot be written, or its disk has no room; names
            kv-swap-dir and the directory. Nothing is left there then.
    """

    def __init__(self, directory: str, num_slots: int, slot_bytes: int) -> None:
        assert num_slots * slot_bytes > 0, f"a file of {num_slots} slots of {slot_bytes}"
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.checksums: list[int | None] = [None] * num_slots  # of what a slot should hold
        try:
            self._file = unnamed_file(directory, num_slots * slot_bytes)
        except OSError as error:
            size = f"{num_slots * slot_bytes / GIB:.2f} GiB"
            raise ValueError(
                f"kv-swap-dir {directory!r} must be a directory that can be written, with room for "
                f"a file of {size}: {error.strerror or error}"
            ) from None
        self.fd = self._file.fileno()

    def write(self, slot: int, data: memoryview) -> None:
        """Stores slot_bytes. Raises OSError: the slot then holds nothing."""
        assert data.nbytes == self.slot_bytes, f"{data.nbytes} bytes for {self.slot_bytes}"
        self.checksums[slot] = None
        checksum = zlib.crc32(data)
        done = 0
        while done < self.slot_bytes:
            offset = slot * self.slot_bytes + done
            done += os.pwritev(self.fd, [data[done:]], offset)
        self.checksums[slot] = checksum

    def read(self, slot: int, into: memoryview) -> None:
        """Fetches slot_bytes. Raises OSError: they are not those that were stored, or unreadable.

        What into holds is worth nothing then.
        """
        assert into.nbytes == self.slot_bytes, f"{into.nbytes} bytes for {self.slot_bytes}"
        done = 0
        while done < self.slot_bytes:
            offset = slot * self.slot_bytes + done
            count = os.preadv(self.fd, [into[done:]], offset)
            if not count:
                raise BadSlot(f"slot {slot}: the file is too short")
            done += count
        if zlib.crc32(into) != self.checksums[slot]:
            raise BadSlot(f"slot {slot}: the checksum is wrong")

    def close(self) -> None:
        """Gives the room on the disk back. May be repeated."""
        self._file.close()
