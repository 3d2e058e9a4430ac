"""Budgets under pressure in worlds of integers: who shrinks, when, and for whom."""

from __future__ import annotations

from collections import Counter
from typing import Any

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from random_worlds import random_swap_world, random_world
from vllm.v1.request import RequestStatus
from world_rules import Rules
from worlds import World, small_world

from paged_kv.core.schedule import NEVER

NUM_SEEDS = 40
KINDS: dict[str, dict[str, Any]] = {
    "at once": {},
    "after a window": {"lead": 5},
    "with scores": {"lead": 3, "private_hits": True},
    "uncached": {"caching": False},
    "priorities": {"priorities": True},
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_read_is_that_of_a_private_run(kind: str, asynchronous: bool) -> None:
    """And nobody is preempted while somebody can shrink: worlds.World checks it."""
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        world = random_world(seed, pressure=True, asynchronous=asynchronous, **KINDS[kind])
        seen += world.seen + world.scheduler.pressure.counts
        seen["compactions"] += world.worker.num_events
        seen["replaced"] += world.worker.num_replaced
    assert seen["shrunk_requests"] > NUM_SEEDS / 2
    assert seen["avoided_preemptions"] > NUM_SEEDS / 4
    assert seen["preempted"] > 0
    assert seen["compactions"] > 5 * NUM_SEEDS
    assert seen["replaced"] > 0 or kind != "with scores"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_swap_comes_after_shrinking(kind: str, asynchronous: bool) -> None:
    fixed = {"priorities": True, "full_groups": 0} if kind == "priorities" else KINDS[kind]
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        world = random_swap_world(seed, pressure=True, asynchronous=asynchronous, **fixed)
        seen += world.seen + world.scheduler.pressure.counts + world.ledger.counts
    assert seen["shrunk_requests"] > NUM_SEEDS / 2
    assert seen["swapped_in_requests"] > 0
    assert seen["evicted"] > 0


def pressed(**rules: Any) -> World:
    return small_world(pressure=True, **rules)


def run_to(world: World, name: str, num_tokens: int) -> None:
    while world.requests[name].num_computed_tokens < num_tokens:
        world.step()


@pytest.mark.parametrize("caching", [False, True])
def test_with_ample_memory_all_is_as_without_a_policy(caching: bool) -> None:
    """Steps, prefix hits and pages of two worlds, of which one has a policy."""
    worlds = [pressed(caching=caching), small_world(budgets=(), full_groups=1, caching=caching)]
    shared = list(range(1, 18))
    for world in worlds:
        for tail in ([20, 21], [22], [23, 24, 25]):
            world.add(shared + tail, 24)
            world.step()
    policy, plain = worlds
    while plain.scheduler.requests:
        for world in worlds:
            world.step()
        assert policy.worker.reads == plain.worker.reads
        names = [name for name in plain.requests if name in plain.scheduler.requests]
        assert [policy.held(name) for name in names] == [plain.held(name) for name in names]
    assert policy.chunks == plain.chunks
    assert policy.hits == plain.hits
    assert any(plain.hits.values()) == caching
    assert policy.worker.num_events == policy.worker.num_copies == policy.worker.num_snapshots == 0
    assert not policy.scheduler.pressure.counts


def test_the_largest_surplus_shrinks_first_and_of_equal_ones_the_oldest() -> None:
    world = pressed(num_pages=36, caching=False)
    small, large, later, _ = (world.add([n] * n, 62 - n) for n in (5, 30, 28, 28))
    order: list[str] = []
    while world.scheduler.requests:
        world.step()
        running = [name for name in world.scheduler.requests if name not in order]
        order += [name for name in running if world.start(name) < NEVER]
    assert order[:2] == [large, later]
    assert small not in order[2:3]
    assert world.seen["preempted"] == 0


def test_lower_priorities_shrink_first() -> None:
    world = pressed(num_pages=24, caching=False, priorities=True)
    urgent, other = world.add([1] * 30, 30, priority=0), world.add([2] * 20, 30, priority=5)
    while not world.scheduler.pressure.counts["shrunk_requests"]:
        world.step()
    assert world.start(other) < NEVER
    assert world.start(urgent) == NEVER


@pytest.mark.parametrize("lead", [1, 4])
def test_who_waits_is_admitted_when_the_others_have_shrunk(lead: int) -> None:
    """One step later, or as many as the policy looks at queries."""
    world = pressed(num_pages=16, caching=False, lead=lead)
    first = world.add([1] * 32, 20)
    for _ in range(3):
        world.step()
    assert world.start(first) == NEVER
    second = world.add([2] * 30, 4)
    world.step()
    assert second not in world.chunks
    assert world.start(first) == world.requests[first].num_computed_tokens + lead - 1
    for _ in range(lead):
        world.step()
    assert second in world.chunks
    assert world.seen["preempted"] == 0
    world.run(100)


def test_nobody_shrinks_for_who_would_not_fit_all_the_same() -> None:
    world = pressed(num_pages=20, caching=False, max_len=76, budgets=((40, 0, 1),))
    first = world.add([1] * 48, 20)
    world.step()
    world.step()
    world.add([2] * 72, 2)
    for _ in range(5):
        world.step()
    assert world.start(first) == NEVER
    world.run(100)
    world.check_empty()


def test_a_prompt_that_can_never_fit_is_refused_as_ever() -> None:
    world = pressed(num_pages=10)
    name = world.add([1] * 40, 4)
    assert name not in world.scheduler.requests
    assert world.requests[name].status == RequestStatus.FINISHED_ERROR


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("full_groups", [0, 1])
@pytest.mark.parametrize("prompt_len", [1, 20, 43, 44])
def test_one_that_outgrows_the_pool_shrinks_in_time(
    prompt_len: int, full_groups: int, asynchronous: bool
) -> None:
    """Alone, and with layers beside it that keep everything: it could not be resumed otherwise."""
    rules = {"full_groups": full_groups, "asynchronous": asynchronous}
    world = pressed(num_pages=12 + 18 * full_groups, max_len=72, **rules)
    longest = world.max_prompt_len()
    assert longest == 44
    world.add([1] * prompt_len, 72 - prompt_len)
    world.run(200)
    assert world.seen["preempted"] == 0
    assert world.worker.num_events > 0
    world.check_empty()


def test_pages_that_two_share_come_back_when_both_have_shrunk() -> None:
    """Neither alone would give any back: what it leaves, the other one has."""
    world = pressed(num_pages=30, max_len=96, budgets=((8, 0, 1),), batch=96)
    prompt = [1 + n % 3 for n in range(64)]
    one = world.add(prompt, 24)
    world.step()
    two = world.add([*prompt, 2], 24)
    world.step()
    assert world.hits[two] == 64
    third = world.add([3] * 48, 2)
    for _ in range(4):
        world.step()
    assert world.start(one) < NEVER
    assert world.start(two) < NEVER
    assert third in world.chunks
    assert world.seen["preempted"] == 0
    world.run(100)
    world.check_empty()


def test_who_is_aborted_while_it_shrinks_is_forgotten() -> None:
    world = pressed(num_pages=16, caching=False, lead=6)
    first = world.add([1] * 32, 20)
    world.step()
    world.step()
    second = world.add([2] * 30, 4)
    world.step()
    assert world.start(first) < NEVER
    world.abort(first)
    world.step()
    assert second in world.chunks
    world.run(100)
    world.check_empty()
    assert not world.scheduler.pressure._coming
    assert not world.worker.starts


def test_rules_without_pressure_tell_nothing() -> None:
    world = World(Rules(num_pages=40))
    world.add([1] * 20, 10)
    output = world.scheduler.schedule()
    assert not hasattr(output, "paged_kv_starts")


def test_who_waits_gets_what_admission_leaves_to_others_too() -> None:
    """A surplus that covers the prompt alone would be given up for nothing."""
    for num_pages in range(14, 30):
        world = pressed(num_pages=num_pages, caching=False)
        first = world.add([1] * 32, 20)
        world.step()
        world.step()
        second = world.add([2] * 30, 4)
        for _ in range(3):
            world.step()
        assert (second in world.chunks) or world.start(first) == NEVER, num_pages
