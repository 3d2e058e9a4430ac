"""Disks that are full, read-only, missing or damaged: it is said, and no wrong page comes back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
import torch
from memory import resident_bytes
from swap_slots import SLOT, fill, opened, swap_tiers

from paged_kv.tiers.host import available_bytes
from paged_kv.tiers.swap_tiers import SwapTiers


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[SwapTiers]:
    with swap_tiers(tmp_path) as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with disks.mounted(tmp_path / "disk", "64k") as disk:
        yield disk


@pytest.mark.parametrize("kind", ["missing", "file", "no permission"])
def test_a_directory_that_cannot_be_used(kind, tmp_path):
    directory = tmp_path / "there"
    if kind == "file":
        directory.write_text("something")
    elif kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.mkdir(mode=0o500)
    before = resident_bytes()
    with pytest.raises(ValueError, match=rf"kv-swap-dir '{directory}' must be a directory"):
        SwapTiers(1 << 20, host_slots=64, file_slots=1, directory=str(directory))
    assert resident_bytes() - before < 16 << 20  # refused before memory was taken


def test_a_disk_that_is_full(small_disk):
    with pytest.raises(ValueError, match=r"room for a file of .* GiB: No space left"):
        SwapTiers(SLOT, host_slots=1, file_slots=14, directory=str(small_disk))
    assert not list(small_disk.iterdir())
    SwapTiers(SLOT, host_slots=1, file_slots=12, directory=str(small_disk)).close()


def test_a_disk_that_is_read_only(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match=r"kv-swap-dir .*: Read-only file system"):
        SwapTiers(SLOT, host_slots=1, file_slots=1, directory=str(small_disk))


def test_more_memory_than_there_is(tmp_path):
    slots = 2 * available_bytes() // SLOT
    with pytest.raises(ValueError, match=r"kv-swap-space: .* GiB are available"):
        SwapTiers(SLOT, host_slots=slots, file_slots=1, directory=str(tmp_path))
    assert not list(tmp_path.iterdir())


def truncate(file: Path) -> None:
    os.truncate(file, 2 * SLOT + 10)


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(2 * SLOT + 77)
        (byte,) = opened.read(1)
        opened.seek(2 * SLOT + 77)
        opened.write(bytes([byte ^ 4]))


def lose(file: Path) -> None:
    """As a disk does that did not write what it said it had."""
    with file.open("r+b") as opened:
        opened.seek(2 * SLOT)
        opened.write(bytes(SLOT))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose])
def test_a_damaged_file(damage, tiers, tmp_path, caplog):
    data = fill(tiers, range(4), seed=1)
    tiers.demote("whole", [0, 1], [0, 1])
    tiers.demote("damaged", [2, 3], [2, 3])
    tiers.wait(range(4))
    damage(opened(tiers))
    tiers.promote("damaged", [3], [5])
    tiers.wait([5])
    tiers.promote("damaged", [2], [4])
    tiers.promote("whole", [0, 1], [6, 7])
    tiers.wait(range(4, 8))
    assert tiers.take_finished() == ({"whole"}, {"damaged"})
    assert torch.equal(tiers.host[6:8], data[:2])
    assert "swapped pages are lost" in caplog.text
    tiers.promote("damaged", [2, 3], [4, 5])  # somebody has not heard of it yet
    tiers.wait(range(4, 8))
    assert tiers.take_finished() == (set(), set())
    # The same name and slots again, for another request.
    tiers.forget("damaged")
    data = fill(tiers, range(2), seed=2)
    tiers.demote("damaged", [0, 1], [2, 3])
    tiers.promote("damaged", [2, 3], [8, 9])
    tiers.wait([8, 9])
    assert tiers.take_finished() == ({"damaged"}, set())
    assert torch.equal(tiers.host[8:10], data)
