"""Swapped pages in host memory and files: what comes back is what went out."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swap_slots import SLOT, fill, opened, swap_tiers

from paged_kv.tiers.swap_tiers import SwapTiers


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[SwapTiers]:
    with swap_tiers(tmp_path) as made:
        yield made


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
