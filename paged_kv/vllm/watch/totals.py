"""Numbers that one process writes and others read, in a mapped file that says what they are.

    length of the header | header: JSON, padded to 8 bytes | int64, int64, ...

A number is written at once, since it is aligned; numbers of one step may be read a step apart.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger

from paged_kv.vllm.watch import places

logger = init_logger(f"vllm.{__name__}")

_WORD = 8  # bytes


class Series(NamedTuple):
    """One number. Its name is one of metrics.METRICS, its labels are that metric's."""

    name: str
    labels: Mapping[str, str]


class Totals:
    """An open file: what it holds, and the numbers, live.

    Attributes:
        path: of the file.
        series: what the numbers are.
        facts: what else the writer says of itself, once.
        values: int64 [series], mapped; the writer's alone to write.
    """

    def __init__(
        self, path: Path, series: Sequence[Series], facts: Mapping[str, Any], values: Any
    ) -> None:
        self.path, self.series, self.facts = path, list(series), facts
        self.values: npt.NDArray[np.int64] = values


def for_engine(
    engine: int, rank: int | None, series: Sequence[Series], facts: Mapping[str, Any]
) -> Totals | None:
    """A new file in this server's directory; None: nobody looks, or there is no room for it.

    Args:
        engine: vLLM's number of the engine.
        rank: of the worker whose it is; None: it is the scheduler's.
        series: see Totals.
        facts: see Totals.
    """
    directory = places.directory()
    if directory is None:
        return None
    path = places.file_of(directory, engine, rank)
    try:
        return create(path, series, facts)
    except OSError as error:
        logger.warning("paged_kv: no metrics of %s: %s", path.name, error)
        return None


def create(path: Path, series: Sequence[Series], facts: Mapping[str, Any]) -> Totals:
    """A new file, all zeros; in place of one of that name, whose readers keep the old one.

    Raises:
        OSError: there is no room for it.
    """
    header = json.dumps({"series": series, "facts": facts}).encode()
    header += b" " * (-len(header) % _WORD)
    new = path.with_name(f".{path.name}.new")
    with new.open("wb+") as file:
        size = _WORD + len(header) + _WORD * len(series)
        os.posix_fallocate(file.fileno(), 0, size)  # or a write to the mapping could kill us
        file.write(len(header).to_bytes(_WORD, "little") + header)
        file.flush()
        values = _map(file.fileno(), size, _WORD + len(header))
    _exported(path).unlink(missing_ok=True)  # of what the old one has counted
    new.rename(path)
    return Totals(path, series, facts, values)


def read(path: Path) -> Totals:
    """The file that another process writes. Raises OSError: there is none."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(_WORD), "little")
        header = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size
        values = _map(file.fileno(), size, _WORD + length)
    series = [Series(name, labels) for name, labels in header["series"]]
    return Totals(path, series, header["facts"], values)


class Increments:
    """What a file's numbers have grown by; each increment is taken by one of several processes.

    Args:
        totals: the file.
    """

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        size = _WORD * len(totals.series)
        self._lock = os.open(_exported(totals.path), os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._lock, 0, size)
        self._taken = _map(self._lock, size, 0)

    def take(self) -> npt.NDArray[np.int64]:
        """int64 [series], what is new since anybody took it."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            now = self._totals.values.copy()
            new = now - self._taken
            self._taken[:] = now
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return new


def _exported(path: Path) -> Path:
    return path.with_name(f"{path.name}-exported")


def _map(file: int, size: int, offset: int) -> npt.NDArray[np.int64]:
    """The file from offset on; the mapping stays when the file is closed."""
    if size == offset:
        return np.zeros(0, np.int64)
    return np.frombuffer(mmap.mmap(file, size), np.int64, offset=offset)
