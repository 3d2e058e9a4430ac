"""Worlds of integers in which requests come, go and are preempted at random: what they read."""

from __future__ import annotations

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from random_worlds import random_world

NUM_SEEDS = 60


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize(
    "fixed",
    [
        pytest.param({}, id="cached"),
        pytest.param({"caching": False}, id="uncached"),
        pytest.param({"compress_prefill": True}, id="compress-prefill"),
        pytest.param({"asynchronous": True}, id="async"),
        pytest.param({"asynchronous": True, "compress_prefill": True}, id="async-compress-prefill"),
    ],
)
def test_every_read_is_that_of_a_private_run(fixed, seed):
    random_world(seed, **fixed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_worlds_do_what_they_are_meant_to_test(asynchronous):
    worlds = [random_world(seed, asynchronous=asynchronous) for seed in range(NUM_SEEDS)]
    assert sum(world.worker.num_events for world in worlds) > 20 * NUM_SEEDS
    assert sum(world.worker.num_copies for world in worlds) > NUM_SEEDS / 3
    assert sum(hit > 0 for world in worlds for hit in world.hits.values()) > NUM_SEEDS / 2
    preemptions = [r.num_preemptions for world in worlds for r in world.requests.values()]
    assert sum(preemptions) > NUM_SEEDS / 2
