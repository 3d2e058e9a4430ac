"""A file of slots for swapped pages: preallocated, locked for life, removed at the end.

    DIR/paged_kv-<process>-<rank>-<random>.swap      slot 0 | slot 1 | slot 2 | ...

Read and written at offsets, not through a mapping: where a file has been cut or its disk fails, a
read of a mapping kills the process (SIGBUS), and pread returns fewer bytes or an error.

A process that is killed leaves its file behind. The kernel gives back its lock, though, so whoever
starts next in the directory knows that the file is nobody's and removes it. Finding such files, and
making and locking one's own, happens under a lock on the directory, or a file could be taken for
nobody's between the two.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterator

from paged_kv.tiers.host import GIB

OURS = re.compile(r"paged_kv-\d+-\d+-[0-9a-f]{16}\.swap")


class BadSlot(OSError):
    """A slot does not hold what was written to it."""


class SwapFile:
    """num_slots slots of slot_bytes in a file of their own, in a directory that others may share.

    Raises:
        ValueError: the directory is missing or cannot be written, or its disk has no room; names
            kv-swap-dir and the directory. Nothing is left there then.
    """

    def __init__(self, directory: str, num_slots: int, slot_bytes: int, rank: int = 0) -> None:
        assert num_slots * slot_bytes > 0, f"a file of {num_slots} slots of {slot_bytes}"
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.checksums: list[int | None] = [None] * num_slots  # of what a slot should hold
        name = f"paged_kv-{os.getpid()}-{rank}-{secrets.token_hex(8)}.swap"
        self.path = os.path.join(directory, name)
        try:
            with _locked(directory) as folder:
                _remove_leftovers(folder)
                self.fd = _create(folder, name, num_slots * slot_bytes)
        except OSError as error:
            size = f"{num_slots * slot_bytes / GIB:.2f} GiB"
            raise ValueError(
                f"kv-swap-dir {directory!r} must be a directory that can be written, with room for "
                f"a file of {size}: {error.strerror or error}"
            ) from None

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
        """Removes the file. May be repeated."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self.fd)
        self.fd = -1


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[int]:
    """The directory's descriptor, while nobody else makes or removes files of ours in it."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(folder)


def _create(folder: int, name: str, size: int) -> int:
    """The descriptor of a new, locked file with all its room on the disk. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.unlink(name, dir_fd=folder)
        os.close(fd)
        raise
    return fd


def _remove_leftovers(folder: int) -> None:
    """Removes files of ours that no process holds, as far as we may."""
    for name in filter(OURS.fullmatch, os.listdir(folder)):
        # One may vanish at any time: its process closes it without asking for the lock.
        with contextlib.suppress(OSError):
            _remove_leftover(folder, name)


def _remove_leftover(folder: int, name: str) -> None:
    """Removes the file. Raises OSError: it is held by a process that lives, or it is gone."""
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    # A name is easily given to something else: links, folders and other users' files stay.
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        return
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    finally:
        os.close(fd)
