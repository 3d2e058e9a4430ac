"""Where swapped pages wait: slots of host memory, and slots of a file for what does not fit there.

Somebody else decides which slots are whose; here bytes move between the two, in a thread of their
own and in the order in which they were asked for, so that a slot may be given to somebody else
while jobs for its last owner still wait.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paged_kv.tiers.files import SwapFile
from paged_kv.tiers.host import allocate

logger = logging.getLogger(__name__)


@dataclass
class _Job:
    """Moves slots of the host's to slots of the file's, or back."""

    key: str
    host_slots: list[int]
    file_slots: list[int]
    is_promotion: bool
    ready: Callable[[], None] | None = None
    forgotten: bool = False


class SwapTiers:
    """host: uint8 [host_slots, slot_bytes], all of it taken at the start; and perhaps a file.

    A slot holds a page of one layer group with all that lies beside it. A key is a request that is
    swapped out; it fails when one of its slots cannot be written, or does not come back as it was
    written. Its slots then hold nothing, and nothing of it is moved any more until it is forgotten.

    Args:
        slot_bytes: size of a slot.
        host_slots: slots in host memory.
        file_slots: slots in the file; 0 for no file.
        directory: where the file is.
        pin: whether host memory is page-locked, for copies from a GPU.

    Raises:
        ValueError: no file can be made in directory, or the machine has not enough memory; names
            kv-swap-dir or kv-swap-space.
    """

    def __init__(
        self,
        slot_bytes: int,
        host_slots: int,
        file_slots: int = 0,
        directory: str = "",
        pin: bool = False,
    ) -> None:
        self._file = SwapFile(directory, file_slots, slot_bytes) if file_slots else None
        try:
            self.host = allocate(host_slots, slot_bytes, pin)
        except ValueError:
            if self._file is not None:
                self._file.close()
            raise
        self._slots = self.host.numpy()  # the same memory
        self._changed = threading.Condition()  # guards all that follows
        self._jobs: deque[_Job] = deque()  # the first one may be under way
        self._busy: Counter[int] = Counter()  # host slot -> jobs that use it
        self._promoting: Counter[str] = Counter()  # key -> promotions that are not done
        self._failed: set[str] = set()  # until forgotten
        self._news: tuple[set[str], set[str]] = (set(), set())  # promoted, failed; not yet told
        self._error: BaseException | None = None
        self._warned: set[tuple[type[OSError], int | None]] = set()
        self._closed = False
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._work, name="paged_kv-swap", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def demote(
        self,
        key: str,
        source: Sequence[int],
        target: Sequence[int],
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Copies the host slots source to the file slots target, by and by.

        ready is called first, in the thread: it waits until source holds what it should (a GPU's
        copy). It is called even if the key is forgotten by then, so that whoever waits for source
        has waited for that copy.
        """
        self._add(_Job(key, list(source), list(target), False, ready))

    def promote(self, key: str, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies the file slots source back to the host slots target, by and by.

        take_finished says when. Of a key that has failed already nothing is copied, and nothing is
        said again.
        """
        self._add(_Job(key, list(target), list(source), True))

    def wait(self, host_slots: Sequence[int]) -> None:
        """Until no job that was asked for uses these host slots: they may be written."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._error or not any(map(self._busy.get, host_slots))
            )
            self._raise_error()

    def forget(self, key: str) -> None:
        """The key is nobody's any more: its jobs need not be done, and nothing is said of it.

        Its file slots may be used again at once, its host slots after wait. The key may be, too.
        """
        with self._changed:
            for job in self._jobs:
                job.forgotten |= job.key == key
            self._failed.discard(key)
            self._promoting.pop(key, None)
            for news in self._news:
                news.discard(key)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Keys whose promotions are all done, and keys that failed, once each.

        A key may fail before it is promoted: when it could not be written.
        """
        with self._changed:
            self._raise_error()
            news, self._news = self._news, (set(), set())
        return news

    def close(self) -> None:
        """Ends the thread after the slot that it is at, and removes the file. May be repeated.

        In a child that was forked it does nothing: thread and file are its parent's.
        """
        if os.getpid() != self._owner:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._file is not None:
            self._file.close()
        atexit.unregister(self.close)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError("the thread that swaps pages has died") from self._error

    def _add(self, job: _Job) -> None:
        assert self._file is not None, f"{job.key}: there is no file"
        assert len(job.host_slots) == len(job.file_slots), f"{job.key}: slots do not pair up"
        assert all(0 <= slot < len(self.host) for slot in job.host_slots), f"{job.host_slots}"
        assert all(0 <= slot < self._file.num_slots for slot in job.file_slots), f"{job.file_slots}"
        with self._changed:
            self._raise_error()
            self._busy.update(job.host_slots)
            if job.is_promotion:
                self._promoting[job.key] += 1
            self._jobs.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        """The thread: one job after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs[0]
            failure: OSError | None = None
            try:
                self._do(job)
            except OSError as error:
                failure = error
            except BaseException as error:  # told to whoever asks next: nobody sees it here
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            self._finish(job, failure)

    def _do(self, job: _Job) -> None:
        """Raises OSError: a slot cannot be written or read, or is not what was written."""
        assert self._file is not None
        if job.ready is not None:
            job.ready()
        move = self._file.read if job.is_promotion else self._file.write
        for host_slot, file_slot in zip(job.host_slots, job.file_slots, strict=True):
            if job.forgotten or job.key in self._failed or self._closed:
                return
            move(file_slot, memoryview(self._slots[host_slot]))

    def _finish(self, job: _Job, failure: OSError | None) -> None:
        """Releases the host slots of the first job, and notes what is to be told of it."""
        with self._changed:
            promoted, failed = self._news
            first = self._jobs.popleft()
            assert first is job, "jobs are done in order"
            self._busy.subtract(job.host_slots)
            self._busy += Counter()  # drops those that are at 0
            if failure is not None and not job.forgotten and job.key not in self._failed:
                self._failed.add(job.key)
                failed.add(job.key)
                promoted.discard(job.key)
                self._warn(failure)
            if job.is_promotion and not job.forgotten:
                self._promoting[job.key] -= 1
                if not self._promoting[job.key]:
                    del self._promoting[job.key]
                    if job.key not in self._failed:
                        promoted.add(job.key)
            self._changed.notify_all()

    def _warn(self, failure: OSError) -> None:
        """Once for each kind: a disk that fails does so often, and all of them are counted."""
        kind = type(failure), failure.errno
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("swapped pages are lost, so a request is computed again: %s", failure)
