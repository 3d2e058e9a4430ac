import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paged_kv import directory_cache
from paged_kv.directory_cache import MANIFEST, cached_build


class Builder:
    """Writes two small files and counts its calls."""

    def __init__(self, error: Exception | None = None):
        self.calls = 0
        self.error = error

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")
        if self.error is not None:
            raise self.error


def test_second_call_is_a_hit(tmp_path):
    build = Builder()
    for _ in range(2):
        assert cached_build(tmp_path / "a" / "model", "v1", build) == tmp_path / "a" / "model"
    assert build.calls == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]  # no lock, no debris


def truncate(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"weig")


def flip(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"weightz")


def remove(target: Path) -> None:
    (target / "config.json").unlink()


def lose_manifest(target: Path) -> None:
    (target / MANIFEST).unlink()


def break_manifest(target: Path) -> None:
    (target / MANIFEST).write_text('{"recipe": "v1", "fil')


def empty_entries(target: Path) -> None:
    (target / MANIFEST).write_text('{"recipe": "v1", "files": {"config.json": {}}}')


def replace_by_file(target: Path) -> None:
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    target.write_text("")


@pytest.mark.parametrize(
    "damage",
    [truncate, flip, remove, lose_manifest, break_manifest, empty_entries, replace_by_file],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    build = Builder()
    target = cached_build(tmp_path / "model", "v1", build)
    damage(target)
    cached_build(target, "v1", build)
    assert build.calls == 2
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert directory_cache.is_intact(target, "v1")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_recipe_is_rebuilt(tmp_path):
    build = Builder()
    cached_build(tmp_path / "model", "v1", build)
    cached_build(tmp_path / "model", "v2", build)
    assert build.calls == 2


def test_debris_of_a_killed_build_is_removed(tmp_path):
    for state in ("new", "old"):
        (tmp_path / f".model.{state}.tmp").mkdir()
        (tmp_path / f".model.{state}.tmp" / "half").write_text("x")
    cached_build(tmp_path / "model", "v1", Builder())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_build_keeps_what_was_there(tmp_path):
    cached_build(tmp_path / "model", "v1", Builder())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError, match=r"cannot write .*model: No space left on device.*--out"):
        cached_build(tmp_path / "model", "v2", Builder(full))
    assert directory_cache.is_intact(tmp_path / "model", "v1")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("bad hash"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failed_build_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        cached_build(tmp_path / "model", "v1", Builder(error))
    assert list(tmp_path.iterdir()) == []


def test_a_hit_needs_no_write_access(tmp_path, monkeypatch):
    target = cached_build(tmp_path / "model", "v1", Builder())

    def refuse(path):
        raise AssertionError("a hit took the lock")

    monkeypatch.setattr(directory_cache, "locked", refuse)
    assert cached_build(target, "v1", Builder()) == target


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from paged_kv.directory_cache import cached_build

def build(directory):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (directory / "config.json").write_text("{}")

print(cached_build(Path(sys.argv[1]), "v1", build))
"""


def test_of_several_processes_one_builds(tmp_path):
    target, log = tmp_path / "cache" / "model", tmp_path / "log"
    command = [sys.executable, "-c", BUILD_SLOWLY, str(target), str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=60)[0] == f"{target}\n"
        assert process.returncode == 0
    assert log.read_text() == "built\n"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
