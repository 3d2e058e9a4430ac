"""The scheduler in worlds of integers: when pages are freed, and that all requests end."""

from __future__ import annotations

import random

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from random_worlds import random_rules
from world_rules import Rules, start_up_pages
from worlds import World
from worlds import small_world as world

from paged_kv.core.schedule import cdiv

# Freeing


def test_pages_are_free_by_the_next_scheduled_step():
    w = world()
    name = w.add(list(range(1, 31)), 20)
    w.step()
    assert w.num_free == 59 - 8, "30 tokens"
    w.step()
    assert w.num_free == 59 - 8 + 5, "evicted(30) = 20"
    for num_tokens in range(32, 48):
        w.step()
        # Of the tokens before this step.
        evicted = (num_tokens - 1 - 8) // 4 * 4
        assert w.num_free == 59 - (cdiv(num_tokens, 4) - evicted // 4)
        assert w.requests[name].num_computed_tokens == num_tokens
    w.run(10)
    w.check_empty()


def test_nothing_is_freed_before_the_prompts_end():
    w = world(batch=10)
    w.add(list(range(1, 41)), 5)
    free = []
    for _ in range(5):
        w.step()
        free.append(59 - w.num_free)
    assert free == [3, 5, 8, 10, 11 - 8]


def test_pages_are_freed_between_the_chunks_of_a_prompt_with_compress_prefill():
    w = world(batch=10, compress_prefill=True)
    w.add(list(range(1, 41)), 5)
    held = []
    for _ in range(5):
        w.step()
        held.append(59 - w.num_free)
    # After 10, 20, 30, 40, 41 tokens, less what was evicted at the end of the step before.
    assert held == [3, 5 - 0, 8 - 3, 10 - 5, 11 - 8]


def test_async_frees_when_the_step_is_processed():
    w = world(asynchronous=True)
    name = w.add(list(range(1, 31)), 20)
    w.step()
    assert len(w._in_flight) == 1
    before = w.held(name)[0]
    # The next step is scheduled while the prompt's is in flight, which still reads all pages.
    output = w.scheduler.schedule()
    assert output.num_scheduled_tokens == {name: 1}
    assert w.held(name)[0] == before
    w._in_flight.append((output, w.worker.execute(output, set())))
    w.process()
    assert w.held(name)[0] == before, "processed, not yet scheduled again"
    w.step()
    assert w.held(name)[0] == before[5:], "20 tokens are evicted"
    w.run(50)
    w.check_empty()


def test_async_holds_what_steps_in_flight_read():
    w = world(asynchronous=True, budgets=((8, 0, 1), (12, 1, 4)))
    for num_tokens in (5, 17, 23):
        w.add(list(range(num_tokens, 2 * num_tokens)), 40)
    num_checked = 0
    while w.scheduler.requests:
        reads = {
            name: w.worker.reads[name] for o, _ in w._in_flight for name in o.num_scheduled_tokens
        }
        w.step()
        for name in set(reads) & set(w.scheduler.requests):
            for read, held in zip(reads[name], w.held(name), strict=True):
                assert set(read) <= set(held)
                num_checked += 1
    assert num_checked > 100
    w.drain()
    w.check_empty()


# All requests end


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompt_as_long_as_the_pool(asynchronous):
    w = world(num_pages=12, max_len=60, batch=16, asynchronous=asynchronous)
    assert w.max_prompt_len() == 44
    w.add(list(range(1, 45)), 16)
    w.run(40)
    w.check_empty()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize(
    ("num_pages", "budgets"),
    [
        (12, [8]),
        (21, [40]),
        (61, [40, 20, 8]),  # the first group's peak is after the prompt, the others' in it
        (80, [64, 8, 8]),
    ],
)
def test_longest_prompt_is_resumed_in_a_pool_of_its_size(num_pages, budgets, caching, asynchronous):
    w = world(
        num_pages=num_pages,
        budgets=tuple((budget, 0, 1) for budget in budgets),
        max_len=160,
        batch=32,
        caching=caching,
        asynchronous=asynchronous,
    )
    limit = w.max_prompt_len()
    w.add(list(range(1, limit + 1)), 160 - limit)
    for _ in range(30):
        w.step()
    w.scheduler.reset_prefix_cache(reset_running_requests=True)
    w.run(300)
    w.check_empty()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_three_long_answers_in_a_pool_of_thirty_pages(asynchronous):
    """Found in a prototype: a preempted request of 1,057 tokens was never resumed."""
    w = world(
        num_pages=30,
        page_size=32,
        budgets=((128, 1, 4),),
        max_len=2048,
        batch=512,
        asynchronous=asynchronous,
    )
    for index in range(3):
        w.add([index] * 64, 1500)
    w.run(3 * 1500)
    assert sum(request.num_preemptions for request in w.requests.values()) > 0
    w.check_empty()


@pytest.mark.parametrize("seed", range(60))
def test_a_request_alone_never_waits_nor_preempts_itself(seed):
    """Whatever the pool, as long as vLLM starts: the peak that admission reserves is enough."""
    rng = random.Random(seed)
    rules = random_rules(rng, asynchronous=seed % 2 == 0)
    w = World(rules)
    longest = min(w.max_prompt_len() or rules.max_len, rules.max_len - 1)
    prompt_len = rng.choice([1, longest, rng.randint(1, longest)])
    name = w.add([1] * prompt_len, rules.max_len)
    resets = rng.sample(range(1, rules.max_len), 3)
    for step in range(40 * rules.max_len):
        if not w.scheduler.requests:
            break
        w.step()
        # A step past the prompt's end may be allocated before the prompt's pages are freed.
        held_whole = prompt_len + w.scheduler._resume_chunk * rules.asynchronous
        peak = rules.full_groups * cdiv(rules.max_len, rules.page_size) + sum(
            m.peak_pages(rules.max_len, held_whole) for m in w.scheduler.paged_managers
        )
        assert sum(map(len, w.held(name))) <= peak
        if step in resets:
            w.scheduler.reset_prefix_cache(reset_running_requests=True)
    w.drain()
    assert w.requests[name].num_preemptions <= len(resets), "it preempted itself"
    w.check_empty()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("num_pages", range(18, 61, 3))
def test_resume_chunk_is_what_the_pool_holds(num_pages, asynchronous):
    budgets = ((24, 0, 1), (12, 0, 1), (8, 0, 1))
    w = world(num_pages=num_pages, budgets=budgets, asynchronous=asynchronous)
    if start_up_pages(w.scheduler) > num_pages:
        pytest.skip("vLLM would not start")
    assert 1 <= w.scheduler._resume_chunk <= 24
    longest = w.max_prompt_len() or 64
    # Of all three groups at their most, whenever that is; a step later, nothing is in flight.
    peak = sum(m.peak_pages(64, longest) for m in w.scheduler.paged_managers)
    assert peak <= num_pages - 1
    if num_pages == 60:
        assert w.scheduler._resume_chunk == 24


def test_resumed_request_is_recomputed_in_chunks():
    w = world()
    name = w.add(list(range(1, 11)), 50)
    for _ in range(40):
        w.step()
    w.scheduler.reset_prefix_cache(reset_running_requests=True)
    w.run(60)
    begin = w.chunks[name].index((0, 10), 1)
    assert w.chunks[name][begin : begin + 5] == [(0, 10), (10, 18), (18, 26), (26, 34), (34, 42)]


# Ends of requests


def test_workers_are_not_told_of_a_request_that_is_gone():
    world = World(Rules(num_pages=12, max_len=64, batch=40, pressure=True))
    pressure = world.scheduler.pressure
    name = world.add(list(range(1, 21)), 4)
    pressure.tell(name, 20)
    world.abort(name)
    assert not pressure.drain()


@pytest.mark.parametrize("caching", [False, True])
def test_a_reset_while_the_first_step_is_in_flight(caching):
    """The copies that the prefix cache gets of it are in nobody's table, and must not be in use."""
    world = World(
        Rules(num_pages=60, max_len=64, batch=40, asynchronous=True, caching=caching), seed=5
    )
    prompt = list(range(1, 31))
    world.add(prompt, 30)
    world.step()
    (manager,) = world.scheduler.paged_managers
    assert bool(manager.cached_pages.snapshots._in_flight) is caching
    world.reset()
    assert world.pool.get_num_free_blocks() == 59
    world.add(prompt, 30)
    world.run(100)
    world.check_empty()


def test_aborts_give_all_back():
    w = world(num_pages=30, batch=12)
    names = [w.add([index] * 30, 30) for index in range(4)]
    for step, name in enumerate([None, names[3], names[0], None, names[1], names[2]]):
        for _ in range(step):
            w.step()
        if name:
            w.abort(name)
    w.run(5)
    w.check_empty()


def test_async_abort_while_a_step_is_in_flight():
    w = world(asynchronous=True)
    names = [w.add([index] * 12, 30) for index in range(3)]
    for _ in range(6):
        w.step()
    assert w._in_flight
    w.abort(names[1])
    late = w.add([9] * 12, 5)  # may take the pages at once: steps run in order
    w.run(60)
    assert w.requests[late].num_output_tokens == 5
    w.check_empty()


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(1, 1), (1, 50), (40, 1), (8, 1), (9, 1)])
def test_smallest_requests(prompt_len, max_tokens):
    w = world()
    name = w.add([7] * prompt_len, max_tokens)
    w.run(60)
    assert w.requests[name].num_output_tokens == max_tokens
    w.check_empty()
