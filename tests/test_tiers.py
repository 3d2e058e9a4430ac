"""Swapped pages in host memory and files: what comes back is what went out, or it is said."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disks
import pytest
import torch
from memory import resident_bytes

from paged_kv.tiers.host import available_bytes
from paged_kv.tiers.swap_tiers import SwapTiers

SLOT = 5000  # no power of two, and no multiple of a disk's block


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[SwapTiers]:
    made = SwapTiers(SLOT, host_slots=16, file_slots=32, directory=str(tmp_path))
    yield made
    made.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with disks.mounted(tmp_path / "disk", "64k") as disk:
        yield disk


def fill(tiers: SwapTiers, slots: Any, seed: int) -> torch.Tensor:
    """Random bytes in these host slots; returns them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (len(slots), SLOT), dtype=torch.uint8, generator=generator)
    tiers.host[list(slots)] = data
    return data


def opened(tiers: SwapTiers) -> Path:
    """Its file, which has no name, by the descriptor: it can be opened once more."""
    return Path(f"/proc/self/fd/{tiers._file.fd}")


def test_there_and_back(tiers, tmp_path):
    data = fill(tiers, range(4), seed=0)
    tiers.demote("a", [0, 1, 2, 3], [9, 3, 31, 0])
    tiers.wait([0, 1, 2, 3])
    assert tiers.take_finished() == (set(), set())
    tiers.host.zero_()
    tiers.promote("a", [9, 3], [7, 8])
    tiers.promote("a", [31, 0], [15, 2])
    tiers.wait([7, 8, 15, 2])
    assert torch.equal(tiers.host[[7, 8, 15, 2]], data)
    assert tiers.take_finished() == ({"a"}, set())
    assert tiers.take_finished() == (set(), set())
    assert not list(tmp_path.iterdir())  # nobody else can open it, and nothing is ever left
    file = opened(tiers).stat()
    assert file.st_dev == tmp_path.stat().st_dev
    assert file.st_nlink == 0
    assert file.st_size == 32 * SLOT
    assert file.st_blocks * 512 >= 32 * SLOT  # all of it has been given room
    assert file.st_mode & 0o777 == 0o600  # what others asked a model is nobody's business


def test_host_memory_alone():
    tiers = SwapTiers(SLOT, host_slots=3)
    assert tiers.host.shape == (3, SLOT)
    assert not tiers.host.any()
    assert tiers.take_finished() == (set(), set())
    tiers.close()


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


def test_a_slot_that_was_not_written_is_not_read(tiers):
    tiers.promote("a", [5], [0])
    tiers.wait([0])
    assert tiers.take_finished() == (set(), {"a"})


def test_ready_comes_first(tiers):
    """A GPU's copy ends when ready returns; nobody may use the slots before, forgotten or not."""
    copied = threading.Event()
    tiers.demote("a", [0], [0], copied.wait)
    tiers.promote("a", [0], [1])
    data = fill(tiers, [0], seed=3)  # late
    copied.set()
    tiers.wait([1])
    assert torch.equal(tiers.host[1], data[0])
    done = []

    def slowly() -> None:
        time.sleep(0.1)
        done.append(1)

    tiers.demote("b", [3], [1])
    tiers.demote("a", [2], [0], slowly)
    tiers.forget("a")
    tiers.wait([2])
    assert done


def test_an_error_that_is_not_the_disks_is_raised(tmp_path):
    def broken() -> None:
        raise RuntimeError("the GPU is gone")

    tiers = SwapTiers(SLOT, 1, 1, str(tmp_path))
    tiers.demote("a", [0], [0], broken)
    with pytest.raises(RuntimeError, match="thread that swaps pages has died") as caught:
        tiers.wait([0])
    assert "the GPU is gone" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError):
        tiers.take_finished()
    tiers.close()
    assert not list(tmp_path.iterdir())


def test_closing_does_not_wait_for_the_queue(tmp_path):
    tiers = SwapTiers(SLOT, 1, 1, str(tmp_path))
    for _ in range(50):
        tiers.demote("a", [0], [0], lambda: time.sleep(0.05))
    start = time.monotonic()
    tiers.close()
    assert time.monotonic() - start < 1
    tiers.close()
    assert not list(tmp_path.iterdir())


def test_random_jobs_against_doing_them_at_once(tmp_path):
    """The same operations on plain lists, without a thread."""
    rng = random.Random(0)
    tiers = SwapTiers(64, host_slots=12, file_slots=24, directory=str(tmp_path))
    host, file = [0] * 12, [0] * 24  # the byte that each slot is filled with
    away: dict[str, list[int]] = {}  # key -> its file slots
    expected: set[str] = set()
    told: set[str] = set()
    for step in range(3000):
        key = f"{rng.randrange(5)}"
        count = rng.randint(1, 3)
        slots = rng.sample(range(12), count)
        what = rng.choice(["write", "demote", "promote", "forget", "look"])
        if what == "write":
            tiers.wait(slots)
            for slot in slots:
                host[slot] = rng.randrange(1, 256)
                tiers.host[slot] = host[slot]
        elif what == "demote" and key not in away:
            held = {slot for others in away.values() for slot in others}
            away[key] = rng.sample(sorted(set(range(24)) - held), count)
            pause = rng.choice([None, lambda: time.sleep(1e-3)])
            tiers.demote(key, slots, away[key], pause)
            for source, target in zip(slots, away[key], strict=True):
                file[target] = host[source]
        elif what == "promote" and key in away and key not in expected:
            targets = rng.sample(range(12), len(away[key]))
            tiers.promote(key, away[key], targets)
            for source, target in zip(away[key], targets, strict=True):
                host[target] = file[source]
            expected.add(key)
        elif what == "forget" and key in expected:
            # Only what has been promoted: of what has not, nobody knows what the slots hold.
            tiers.wait(range(12))
            told |= tiers.take_finished()[0]
            assert key in told, step
            tiers.forget(key)
            for known in (away, expected, told):
                known.pop(key) if isinstance(known, dict) else known.discard(key)
        elif what == "look":
            tiers.wait(slots)
            for slot in slots:
                assert tiers.host[slot].tolist() == [host[slot]] * 64, step
            promoted, failed = tiers.take_finished()
            assert not failed
            assert not promoted & told
            told |= promoted
            assert told <= expected
    tiers.wait(range(12))
    assert told | tiers.take_finished()[0] == expected
    assert [int(slot[0]) for slot in tiers.host] == host
    tiers.close()


def test_forgotten_jobs_are_not_done(tiers):
    """Neither is their outcome told; the slots are the next one's at once."""
    gate = threading.Event()
    fill(tiers, range(2), seed=5)
    data = fill(tiers, range(2, 4), seed=6)
    tiers.demote("first", [8], [8], gate.wait)
    tiers.demote("a", [0, 1], [0, 1])
    tiers.promote("a", [0, 1], [4, 5])
    tiers.forget("a")
    tiers.demote("b", [2, 3], [1, 0])
    tiers.promote("b", [1, 0], [6, 7])
    tiers.host[4:6] = 7
    gate.set()
    tiers.wait(range(8))
    assert tiers.take_finished() == ({"b"}, set())
    assert torch.equal(tiers.host[6:8], data)
    assert (tiers.host[4:6] == 7).all()


def test_a_forked_child_leaves_the_file_to_its_parent(tiers, tmp_path):
    child = os.fork()
    if not child:
        tiers.close()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    data = fill(tiers, [0], seed=4)
    tiers.demote("a", [0], [0])
    tiers.promote("a", [0], [1])
    tiers.wait([1])
    assert torch.equal(tiers.host[1], data[0])
