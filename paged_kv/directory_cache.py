"""A directory that is built once, checked on every use and swapped in whole: `cached_build`.

Its manifest names the recipe and the size and sha256 of every file, so a truncated, edited or
outdated copy is rebuilt rather than loaded. Knows nothing of models.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "paged_kv_manifest.json"  # marks a directory as ours and says what must be in it


def cached_build(
    target: Path, recipe: str, build: Callable[[Path], None], *, replace_strangers: bool = True
) -> Path:
    """`target`, filled by `build(directory)` unless it already holds what `recipe` wrote.

    Built in a directory beside it and renamed, so that a reader sees all of it or nothing; of
    several processes one builds and the others wait.
    """
    if is_intact(target, recipe):  # without the lock: a cache may be mounted read-only
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{target.name}.lock"):
            if not is_intact(target, recipe):
                if not replace_strangers:
                    check_replaceable(target)
                build_aside(target, recipe, build)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(
            f"cannot write {target}: {reason} "
            "(for another place give --out DIR, or set PAGED_KV_CACHE to move the whole cache)"
        ) from error
    return target


def build_aside(target: Path, recipe: str, build: Callable[[Path], None]) -> None:
    """Build beside `target` and swap it in. The caller holds the lock."""
    staging = target.parent / f".{target.name}.new.tmp"
    discarded = target.parent / f".{target.name}.old.tmp"
    remove(staging)  # left by a process that was killed: we have the lock
    remove(discarded)
    print(f"paged-kv: making {target}", file=sys.stderr)
    try:
        staging.mkdir()
        build(staging)
        write_manifest(staging, recipe)
        if target.exists():
            target.rename(discarded)
        staging.rename(target)
    finally:
        remove(staging)
        remove(discarded)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, and leave no file behind: it may lie beside --out DIR."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("paged-kv: waiting for another process that makes it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        # If the holder before us removed the file, we hold a lock that nobody else sees: again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def read_manifest(directory: Path) -> dict[str, Any]:
    """{"recipe": str, "files": {name: {"size": int, "sha256": str}}}, or {} if unreadable."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return manifest if isinstance(manifest.get("files"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write_manifest(directory: Path, recipe: str) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        path.chmod(
            0o644
        )  # safetensors writes 0600, which a server under another user could not read
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (directory / MANIFEST).write_text(
        json.dumps({"recipe": recipe, "files": files}, indent=2) + "\n"
    )


def is_intact(directory: Path, recipe: str) -> bool:
    manifest = read_manifest(directory)
    if manifest.get("recipe") != recipe:
        return False
    try:
        files = [
            (directory / name, entry["size"], entry["sha256"])
            for name, entry in manifest["files"].items()
        ]
        sizes_match = all(path.stat().st_size == size for path, size, _ in files)
        return sizes_match and all(sha256(path) == digest for path, _, digest in files)
    except (OSError, TypeError, KeyError):
        return False


def check_replaceable(target: Path) -> None:
    """Refuse to replace what the user has there: only an empty directory or one of ours may go."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"--out {target}: is not a directory; give a new or an empty one")
    strangers = {path.name for path in target.iterdir()} - {
        MANIFEST,
        *read_manifest(target).get("files", {}),
    }
    if strangers:
        raise ValueError(
            f"--out {target}: holds files that paged-kv did not write ({min(strangers)}); "
            "give a new or an empty directory"
        )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
