"""Where the processes of a server leave and find what is counted: a directory in memory.

vLLM's own way from the engine to the front end has a fixed form, and no place for anybody else's
numbers. So engines and workers write into files, which are mapped, and whoever serves /metrics
reads them: nobody waits, and several engines and API servers are as simple as one. All of them are
on one machine; what engines on other machines count is not seen.

    DIRECTORY/lock                  held while the server lives
    DIRECTORY/engine-0              its scheduler's (totals.py)
    DIRECTORY/engine-0-rank-0       a worker's
    DIRECTORY/engine-0...-exported  how much of them the front ends have taken over
    DIRECTORY/watched               touched by whoever looks at the live page (endpoint.py)
    DIRECTORY/engine-0-map          what its pool holds, while somebody does (scheduler/page_map.py)
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

VARIABLE = "PAGED_KV_WATCH_DIR"  # for the processes of this server, which inherit it
MEMORY = "/dev/shm"
_PREFIX = "paged-kv-watch-"
_locks: list[int] = []  # open as long as this process lives


def ensure(inherited: bool = False) -> None:
    """There is a directory for the server that this process starts; it goes when the process does.

    Args:
        inherited: this is one of several API servers: the process that started it has made one.
    """
    if not inherited and not _is_made_here():
        _make()


def directory() -> Path | None:
    """This server's; None if it could not be made, or nobody has made one."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name and Path(name).is_dir() else None


def file_of(directory: Path, engine: int, rank: int | None = None) -> Path:
    """The file of an engine's scheduler, or of one of its workers."""
    return directory / (f"engine-{engine}" if rank is None else f"engine-{engine}-rank-{rank}")


def files(directory: Path, engine: int) -> list[Path]:
    """Those of an engine and of its workers that there are."""
    found = directory.glob(f"engine-{engine}*")
    names = re.compile(rf"engine-{engine}(-rank-\d+)?")
    return sorted(path for path in found if names.fullmatch(path.name))


def engine_files(directory: Path) -> dict[int, Path]:
    """The schedulers' files that there are, by engine."""
    found = ((re.fullmatch(r"engine-(\d+)", path.name), path) for path in directory.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def map_file(engine_file: Path) -> Path:
    """What an engine's pool holds; beside its scheduler's file."""
    return engine_file.with_name(f"{engine_file.name}-map")


def watched_file(directory: Path) -> Path:
    """When it was changed last, somebody looked at the maps."""
    return directory / "watched"


def _is_made_here() -> bool:
    path = directory()
    return path is not None and (path / f"by-{os.getpid()}").exists()


def _make() -> None:
    _remove_left()
    try:
        directory = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())
        _locks.append(_lock(Path(directory)))
    except OSError as error:
        logger.warning("paged_kv: no metrics, there is no directory for them: %s", error)
        os.environ.pop(VARIABLE, None)
        return
    os.environ[VARIABLE] = directory
    atexit.register(_remove, directory, os.getpid())


def _parent() -> str:
    return MEMORY if os.access(MEMORY, os.W_OK) else tempfile.gettempdir()


def _lock(directory: Path) -> int:
    """Marks the directory as in use, for as long as this process or a fork of it lives."""
    (directory / f"by-{os.getpid()}").touch()
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove(directory: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(directory, ignore_errors=True)


def _remove_left() -> None:
    """Removes what servers that were killed have left: their locks are free."""
    for path in Path(_parent()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / "lock", os.O_RDWR)
        except OSError:
            continue  # somebody else's, or not complete yet
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)
