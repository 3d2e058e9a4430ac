"""When the live page is told of the pool: while somebody looks, and how often."""

from __future__ import annotations

import base64
import itertools
import json
import os

import engines  # noqa: F401, sets vLLM's environment before it is imported
import numpy as np
import pytest
from worlds import World, small_world

from paged_kv.vllm.scheduler import page_map
from paged_kv.vllm.scheduler.page_map import PageMap
from paged_kv.vllm.watch import places

PROMPT = list(range(1, 25))


def made(world: World, tmp_path) -> PageMap:
    return PageMap(world.scheduler, tmp_path / "engine-0", 4)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as tests set them."""

    class Clock:
        now = 1000.0

    clock = Clock()
    monkeypatch.setattr(page_map.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(page_map.time, "time", lambda: clock.now)
    return clock


def test_a_map_is_written_while_somebody_looks(tmp_path, clock):
    world = small_world()
    watch = made(world, tmp_path)
    file, asked = tmp_path / "engine-0-map", tmp_path / "watched"
    assert file.exists(), "an idle engine has told of its pool"
    world.add(PROMPT, 30)
    world.step()
    watch.update()
    assert not file.exists(), "nobody looks, and what it says is old"
    asked.touch()
    os.utime(asked, (clock.now, clock.now))
    clock.now += 0.4
    watch.update()
    assert not file.exists(), "it has just been seen that nobody looks"
    clock.now += 0.6
    watch.update()
    pages = np.frombuffer(base64.b64decode(json.loads(file.read_text())["pages"]), np.uint8)
    assert (pages == watch.pages()).all()
    written = file.stat().st_ino
    clock.now += 0.9
    watch.update()
    assert file.stat().st_ino == written, "twice within a second"
    clock.now += 0.2
    watch.update()
    assert file.stat().st_ino != written
    clock.now += page_map.WATCHED
    watch.update()
    assert not file.exists(), "nobody looks any more"


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_when_the_last_request_has_ended_the_map_says_so(num_tokens, tmp_path, clock):
    """Also if it took a single step, soon after a map was written."""
    world = small_world()
    watch = made(world, tmp_path)
    asked = tmp_path / "watched"
    asked.touch()
    os.utime(asked, (clock.now, clock.now))
    world.add(PROMPT, num_tokens)
    clock.now += 0.1
    for _ in range(num_tokens):
        world.step()
        watch.update()
    snapshot = json.loads((tmp_path / "engine-0-map").read_text())
    assert snapshot["running"] == 0
    assert set(base64.b64decode(snapshot["pages"])) == {0, page_map.KINDS.index("cached")}


def test_a_request_that_waits_has_no_map_written_early(tmp_path, clock):
    """Steps in which nothing can run may follow each other without a pause."""
    world = small_world()
    watch = made(world, tmp_path)
    asked = tmp_path / "watched"
    asked.touch()
    os.utime(asked, (clock.now, clock.now))
    world.add(PROMPT, 2)
    written = (tmp_path / "engine-0-map").stat().st_ino
    watch.update()
    assert (tmp_path / "engine-0-map").stat().st_ino == written


def test_a_snapshot_that_takes_long_is_seldom(tmp_path, clock, monkeypatch):
    world = small_world()
    watch = made(world, tmp_path)
    snapshot = watch.snapshot

    def slow():
        clock.now += 0.05
        return snapshot()

    monkeypatch.setattr(watch, "snapshot", slow)
    file, asked = tmp_path / "engine-0-map", tmp_path / "watched"
    asked.touch()
    world.add(PROMPT, 30)
    world.step()
    clock.now += 2
    found = []
    for _ in range(12):
        os.utime(asked, (clock.now, clock.now))
        watch.update()
        found.append(file.stat().st_ino)
        clock.now += 1
    kept = [before == after for before, after in itertools.pairwise(found)]
    assert kept == [*[True] * 4, False] * 2 + [True]


def test_no_room_for_the_map(tmp_path, clock):
    """The engine goes on."""
    folder = tmp_path / "gone"
    folder.mkdir()
    world = small_world()
    watch = PageMap(world.scheduler, folder / "engine-0", 4)
    (folder / "engine-0-map").unlink()
    folder.rmdir()
    watch._is_watched = True
    watch._write()


def test_other_files_are_not_taken_for_totals(tmp_path):
    for name in ("engine-0", "engine-0-rank-0", "engine-0-map", "engine-11", "watched", "lock"):
        (tmp_path / name).touch()
    assert [path.name for path in places.files(tmp_path, 0)] == ["engine-0", "engine-0-rank-0"]
    assert places.engine_files(tmp_path) == {0: tmp_path / "engine-0", 11: tmp_path / "engine-11"}
