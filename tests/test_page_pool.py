"""Pages are free or held, never both; runs are free neighbours, as far apart as there is room."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paged_kv.hf.allocator import PageAllocator


class World(RuleBasedStateMachine):
    """The allocator against a plain dict of page -> number of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(6)
        self.holders: dict[int, int] = {}

    def free(self) -> list[int]:
        return [page for page in range(self.allocator.capacity) if page not in self.holders]

    @rule(count=st.integers(1, 4))
    def take(self, count):
        pages = self.allocator.find_free(count)
        assert pages.tolist() == self.free()[:count]
        self.allocator.take(pages)
        self.holders |= dict.fromkeys(pages.tolist(), 1)

    @rule(count=st.integers(1, 3), length=st.integers(1, 4))
    def take_runs(self, count, length):
        free = set(self.free())
        starts = self.allocator.find_runs(count, length)
        sizes, run = [], 0
        for page in range(self.allocator.capacity + 1):
            if page in free:
                run += 1
            elif run:
                sizes.append(run)
                run = 0
        if sum(size // length for size in sizes) < count:
            assert starts is None
            return
        pages = (starts[:, None] + np.arange(length)).ravel()
        assert len(set(pages.tolist())) == count * length
        assert set(pages.tolist()) <= free
        self.allocator.take(pages)
        self.holders |= dict.fromkeys(pages.tolist(), 1)

    @rule(data=st.data())
    def share_or_release(self, data):
        if not self.holders:
            return
        pages = data.draw(st.lists(st.sampled_from(sorted(self.holders)), max_size=5))
        self.allocator.share(np.array(pages, dtype=np.int64))
        for page in pages:
            self.holders[page] += 1
        gone = data.draw(st.lists(st.sampled_from(sorted(self.holders)), unique=True))
        self.allocator.release(np.array(gone, dtype=np.int64))
        for page in gone:
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.holders[page]

    @rule()
    def grow(self):
        if self.allocator.capacity < 40:
            self.allocator.grow(self.allocator.capacity + 5)

    @invariant()
    def agrees(self):
        self.allocator.check_integrity()
        assert self.allocator.num_held == len(self.holders)
        assert self.allocator.num_free == len(self.free())
        pages = np.arange(self.allocator.capacity + 3)
        assert np.flatnonzero(self.allocator.are_free(pages)).tolist() == self.free()


TestWorld = World.TestCase


def test_runs_leave_room_between_them():
    allocator = PageAllocator(100)
    assert allocator.find_runs(4, 10).tolist() == [0, 25, 50, 75]
    allocator.take(np.arange(20, 80))
    assert allocator.find_runs(2, 20).tolist() == [0, 80]
    assert allocator.find_runs(2, 21) is None
    assert allocator.find_runs(4, 5).tolist() == [0, 10, 80, 90]


@pytest.mark.parametrize("operation", ["take", "release", "share"])
def test_mistakes_are_noticed(operation):
    allocator = PageAllocator(3)
    allocator.take(np.array([0]))
    page = {"take": 0, "release": 1, "share": 1}[operation]
    with pytest.raises(AssertionError):
        getattr(allocator, operation)(np.array([page]))


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_no_distance_would_be_larger(held, count, length):
    allocator = PageAllocator(len(held))
    allocator.take(np.flatnonzero(held))
    starts = allocator.find_runs(count, length)
    if starts is None or count == 1:
        return
    runs = "".join("x" if one else "." for one in held).split("x")
    gaps = [len(run) for run in runs if run]
    together = [b - a for a, b in pairwise(starts) if not any(held[a:b])]
    best = max(d for d in range(length, 31) if sum(gap // d for gap in gaps) >= count)
    assert all(distance >= best for distance in together)
