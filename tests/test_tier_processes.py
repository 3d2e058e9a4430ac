"""Tiers of swapped pages and processes: the memory they take, forks, servers that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from memory import free_bytes

from paged_kv.tiers.swap_tiers import SwapTiers

SLOT = 5000  # no power of two, and no multiple of a disk's block


MEMORY = """
import sys
from memory import resident_bytes
from paged_kv.tiers.swap_tiers import SwapTiers

before = resident_bytes()
tiers = SwapTiers(1 << 20, host_slots=64, file_slots=64, directory=sys.argv[1])
grown = resident_bytes() - before
assert 64 << 20 <= grown <= 72 << 20, grown  # taken at the start, not when it is used
for _ in range(4):
    tiers.demote("a", range(64), range(64))
    tiers.promote("a", range(64), range(64))
tiers.wait(range(64))
assert tiers.take_finished() == ({"a"}, set())
assert resident_bytes() - before <= grown + (4 << 20)
tiers.close()
"""


def test_memory_is_what_was_asked_for(tmp_path):
    """In a process of its own: what others gave back would be taken again."""
    line = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=Path(__file__).parent / "support"
    )
    assert done.returncode == 0, done.stderr


SERVER = """
import resource, sys
from paged_kv.tiers.swap_tiers import SwapTiers

tiers = SwapTiers(5000, 8, 4000, sys.argv[1])
tiers.host[:] = 42
print("made", flush=True)
for line in sys.stdin:
    command = line.strip()
    if command == "limit":  # no byte of a file beyond the third slot can be written any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 5000, resource.RLIM_INFINITY))
    elif command == "away":
        tiers.demote("a", range(4), range(4))
        tiers.wait(range(4))
        tiers.host[:] = 0
    elif command == "back":
        tiers.promote("a", range(4), range(4))
        tiers.wait(range(4))
    elif command == "busy":
        for first in range(0, 4000, 8):
            tiers.demote("b", range(8), range(first, first + 8))
    promoted, failed = tiers.take_finished()
    print(sorted(promoted), sorted(failed), int(tiers.host[0, 0]), flush=True)
"""


class Server:
    """SERVER in a process of its own; it ends, without closing anything, when its input does."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def test_several_servers_in_one_directory(tmp_path):
    """One lives, one is killed while it writes; a third one starts. Then a disk begins to fail."""
    living, killed = Server(tmp_path), Server(tmp_path)
    try:
        assert living.answer() == killed.answer() == "made"
        assert living.ask("away") == "[] [] 0"
        assert killed.ask("busy") == "[] [] 42"
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait(30)
        assert not list(tmp_path.iterdir())
        tiers = SwapTiers(SLOT, 4, 4, str(tmp_path))
        assert living.ask("back") == "['a'] [] 42"
        assert living.ask("limit") == "[] [] 42"
        assert living.ask("away") == "[] ['a'] 0"
        assert living.ask("back") == "[] [] 0"
        living.end()
        assert living.process.returncode == 0
        tiers.close()
        assert not list(tmp_path.iterdir())
    finally:
        for server in (living, killed):
            server.process.kill()
            server.end()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    with disks.mounted(tmp_path / "disk", "32m") as disk:
        yield disk


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time_nothing_is_left(seed, small_disk):
    """Neither a name nor room on the disk: its process starts, runs, is killed."""
    rng = random.Random(seed)
    before = free_bytes(small_disk)
    for _ in range(3):
        server = Server(small_disk)
        try:
            if rng.random() < 0.7:
                assert server.answer() == "made"
                assert free_bytes(small_disk) <= before - 4000 * SLOT
                server.process.stdin.write("busy\n")
                server.process.stdin.flush()
            time.sleep(rng.random() * (1.5 if rng.random() < 0.5 else 0.05))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(30)
        finally:
            server.process.kill()
            server.end()
        assert not list(small_disk.iterdir())
        assert free_bytes(small_disk) == before
