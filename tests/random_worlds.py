"""Worlds of integers in which requests come, go and are preempted at random."""

from __future__ import annotations

import random
from typing import Any

from world_rules import Budget, Rules, make_scheduler, start_up_pages
from worlds import World

from paged_kv.vllm import limits


def random_budget(rng: random.Random) -> Budget:
    """A number, or a fraction and the least it comes to."""
    minimum = rng.choice([5, 6, 8, 9, 12, 16, 24, 40])
    return rng.choice([(minimum, 0, 1), (minimum, 0, 1), (minimum, 1, 4), (minimum, 1, 2)])


def random_rules(rng: random.Random, **fixed: Any) -> Rules:
    """Rules under which vLLM would start; some pools are as small as it allows."""
    while True:
        batch = rng.choice([4, 7, 8, 16, 32])
        values: dict[str, Any] = {
            "num_pages": rng.choice([rng.randint(6, 60), rng.randint(20, 90)]),
            "budgets": tuple(random_budget(rng) for _ in range(rng.choice([1, 1, 2, 3]))),
            "full_groups": rng.choice([0, 0, 0, 1]),
            "max_len": rng.choice([24, 32, 48, 64, 96, 128]),
            "batch": batch,
            "seqs": min(batch, rng.randint(2, 6)),
        }
        rules = Rules(**{**values, **fixed})
        # Less: vLLM counts its null page as if it were of use.
        if start_up_pages(make_scheduler(rules)) < rules.num_pages:
            return rules


def random_prompt(rng: random.Random, world: World, longest: int) -> list[int]:
    """Often begins as an earlier request did, with its output or without; often very long."""
    prompt: list[int] = []
    if world.requests and rng.random() < 0.75:
        other = rng.choice(list(world.requests.values()))
        known = list(rng.choice([other.all_token_ids, other.prompt_token_ids]))
        prompt = known[: rng.choice([len(known), rng.randint(0, len(known))])]
    prompt += [rng.randint(1, 3) for _ in range(rng.choice([0, 1, rng.randint(1, longest)]))]
    if rng.random() < 0.3:
        prompt += [3] * longest
    return prompt[: rng.choice([longest, longest, rng.randint(1, longest)])] or [1]


def random_world(seed: int, **fixed: Any) -> World:
    """Arrivals, aborts and resets at random until all is done; every step is checked.

    Args:
        seed: of everything.
        fixed: values of Rules that are not random.
    """
    rng = random.Random(seed)
    world = World(random_rules(rng, **fixed))
    rules, scheduler = world.rules, world.scheduler
    limit = limits.max_prompt_len(scheduler.vllm_config, rules.num_pages)
    longest = min(rules.max_len - 1, limit or rules.max_len)
    for _ in range(rng.randint(3, 10)):
        prompt = random_prompt(rng, world, longest)
        world.add(prompt, rng.randint(1, rules.max_len - len(prompt) + 3))
        for _ in range(rng.choice([0, 0, 1, 3, 20])):
            world.step()
        if scheduler.requests and rng.random() < 0.1:
            world.abort(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.08:
            scheduler.reset_prefix_cache(reset_running_requests=True)
    # One after the other, a request takes at most max_len steps; preempted ones begin anew.
    world.run(3 * rules.max_len * len(world.requests))
    world.check_empty()
    return world
