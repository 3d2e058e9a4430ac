"""The swap in worlds of integers, with steps in flight as no engine on a CPU has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from random_worlds import random_swap_world
from world_rules import Rules
from worlds import World

from paged_kv.vllm.swap.commands import Save

NUM_SEEDS = 150
KINDS: dict[str, dict[str, Any]] = {
    "cached": {},
    "priorities": {"priorities": True, "full_groups": 0},
    "compress-prefill": {"compress_prefill": True},
    "full": {"budgets": (), "full_groups": 1},
    "two full groups": {"budgets": (), "full_groups": 2},
}
ALWAYS = {
    "swapped_in_requests",
    "swapped, then aborted",
    "fallback_full",
    "fallback_io_error",
    "fallback_reset",
    "demoted_requests",
    "promoted in the background",
}
IN_FLIGHT = {"truncated", "fallback_stale"}  # reset throws output away


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_read_is_that_of_an_undisturbed_run(kind: str, asynchronous: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        world = random_swap_world(seed, asynchronous=asynchronous, **KINDS[kind])
        seen += world.seen + world.worker.copier.seen + world.ledger.counts
    wanted = ALWAYS | (IN_FLIGHT if asynchronous else set())
    wanted |= {"evicted"} if KINDS[kind].get("budgets", True) else set()
    wanted |= {"hit"} if kind in ("cached", "full") else set()
    assert not wanted - set(seen)


def decoding(private_hits: bool) -> tuple[World, str]:
    """A request of which a step is in flight, and the output of that is thrown away."""
    rules = Rules(
        num_pages=60,
        max_len=64,
        batch=40,
        asynchronous=True,
        swap=(40, 0),
        private_hits=private_hits,
    )
    world = World(rules)
    name = world.add(list(range(1, 31)), 30)
    while world.requests[name].num_computed_tokens < 42:
        world.step()
    world.reset()
    return world, name


@pytest.mark.parametrize("private_hits", [False, True])
def test_output_that_was_thrown_away_is_cut_off_unless_it_counts_in_scores(
    private_hits: bool,
) -> None:
    world, name = decoding(private_hits)
    world.step()
    counts = world.ledger.counts
    assert counts["fallback_stale"] == private_hits
    assert counts["swapped_in_requests"] == (not private_hits)
    assert world.restored[name] == (0 if private_hits else 41)
    world.run(60)
    world.run_out()
    assert world.requests[name].num_output_tokens == 30
    world.check_empty()


def test_a_request_that_cannot_come_back_is_in_the_prefix_cache_again() -> None:
    """Found at random: the managers went on to believe that it had come back compressed.

    The host tier holds one of two. When that one is loaded, its slots are not free before the step
    is done, so the other one cannot come up from the file, and begins anew.
    """
    world = World(Rules(num_pages=60, max_len=64, batch=40, swap=(4, 20)))
    back, anew = (world.add(list(range(first, first + 18)), 40) for first in (1, 31))
    for _ in range(5):
        world.step()
    world.reset()
    world.step()
    assert world.ledger.counts["demoted_requests"] == 1
    assert world.ledger.counts["fallback_full"] == 1
    assert world.restored[back] > 0
    assert world.restored[anew] == 0
    hitter = world.add(list(range(31, 49)), 3)
    world.step()
    assert world.hits[hitter] == 16
    world.run(100)
    world.run_out()
    world.check_empty()


def test_a_victim_with_copies_that_are_not_made_yet_is_saved_from_where_they_come() -> None:
    """Under priorities one can be preempted in the schedule() that gave them to it."""
    world = World(Rules(num_pages=60, max_len=64, batch=40, swap=(40, 0), private_hits=True))
    scheduler, connector = world.scheduler, world.scheduler.connector
    (manager,) = scheduler.paged_managers
    prompt = list(range(1, 25))
    world.add(prompt, 20)
    world.step()
    hitter = world.add([*prompt, 25], 20)
    take = scheduler.kv_cache_manager.take_kv_cache_block_copies
    saved: list[tuple[set[int], dict[int, int]]] = []

    def preempted_now() -> Any:
        copies = {
            target.block_id: source.block_id for source, target in manager._pending_cow_copies
        }
        if copies and not saved:
            connector.swap_out(world.requests[hitter])
            [save] = [one for one in world.ledger._commands if isinstance(one, Save)]
            saved.append((set(save.pages.page_ids[0]), copies))
        return take()

    scheduler.kv_cache_manager.take_kv_cache_block_copies = preempted_now
    scheduler.schedule()
    [(pages, copies)] = saved
    assert copies
    assert set(copies.values()) <= pages
    assert not set(copies) & pages
