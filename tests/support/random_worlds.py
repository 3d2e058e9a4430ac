"""Worlds of integers in which requests come, go and are preempted at random."""

from __future__ import annotations

import random
from typing import Any

from world_rules import Budget, Rules, make_scheduler, max_prompt_len, start_up_pages
from worlds import World


def random_budget(rng: random.Random) -> Budget:
    """A number, or a fraction and the least it comes to."""
    minimum = rng.choice([5, 6, 8, 9, 12, 16, 24, 40])
    return rng.choice([(minimum, 0, 1), (minimum, 0, 1), (minimum, 1, 4), (minimum, 1, 2)])


def random_rules(rng: random.Random, most_pages: int = 90, **fixed: Any) -> Rules:
    """Rules under which vLLM would start; some pools are as small as it allows."""
    while True:
        batch = rng.choice([4, 7, 8, 16, 32])
        values: dict[str, Any] = {
            "num_pages": rng.choice([rng.randint(6, 60), rng.randint(20, most_pages)]),
            "budgets": tuple(random_budget(rng) for _ in range(rng.choice([1, 1, 2, 3]))),
            "full_groups": rng.choice([0, 0, 0, 1]),
            "max_len": rng.choice([24, 32, 48, 64, 96, 128]),
            "batch": batch,
            "seqs": rng.randint(2, 6),
        }
        values.update(fixed)
        values["seqs"] = min(values["seqs"], values["batch"])
        rules = Rules(**values)
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
    world = World(random_rules(rng, **fixed), seed=seed)
    rules, scheduler = world.rules, world.scheduler
    longest = max_prompt_len(rules, scheduler)
    for _ in range(rng.randint(3, 10)):
        prompt = random_prompt(rng, world, longest)
        world.add(prompt, rng.randint(1, rules.max_len - len(prompt) + 3))
        for _ in range(rng.choice([0, 0, 1, 3, 20])):
            world.step()
        if scheduler.requests and rng.random() < 0.1:
            world.abort(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.08:
            world.reset()
    # One after the other, a request takes at most max_len steps; preempted ones begin anew.
    world.run(3 * rules.max_len * len(world.requests))
    world.check_empty()
    return world


def random_swaps(rng: random.Random, **fixed: Any) -> Rules:
    """Rules with a swap, and with little room in all tiers."""
    host = rng.choice([rng.randint(2, 12), rng.randint(8, 30)])
    values: dict[str, Any] = {
        "swap": (host, rng.choice([0, rng.randint(1, 40), 200])),
        "ring_slots": rng.choice([0, 0, 1, 2]),
        "ranks": rng.choice([1, 1, 2]),
        "private_hits": rng.random() < 0.2,
        # Of a victim that the step had scheduled, vLLM's own managers keep the pages hashed.
        "priorities": False,
        "max_len": rng.choice([24, 32, 48, 64]),
        "seqs": rng.randint(3, 8),
    }
    return random_rules(rng, 30, **{**values, **fixed})


def random_swap_world(seed: int, **fixed: Any) -> World:
    """The same with a swap: resets while requests come, and when no more do."""
    rng = random.Random(seed)
    world = World(random_swaps(rng, **fixed), seed=seed)
    rules, scheduler = world.rules, world.scheduler
    longest = max_prompt_len(rules, scheduler)
    to_come = rng.randint(4, 10)
    for _ in range(200 * to_come):
        if to_come and rng.random() < 0.2:
            to_come -= 1
            prompt = random_prompt(rng, world, rng.choice([longest, max(1, longest // 3)]))
            num_tokens = rng.randint(1, rules.max_len - len(prompt) + 3)
            world.add(prompt, num_tokens, priority=rng.choice([0, 0, 1, 2]))
        if scheduler.requests and rng.random() < 0.02:
            world.abort(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.04:
            world.reset(reset_connector=rng.random() < 0.05)
        if not (to_come or scheduler.requests):
            break
        world.step()
    world.run(6 * rules.max_len * len(world.requests))
    world.run_out()
    world.check_empty()
    return world
