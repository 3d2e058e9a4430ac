"""Pages of requests in worlds of integers: what is shared, copied, rewritten and given back."""

from __future__ import annotations

import inspect

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from world_worker import next_token
from worlds import World
from worlds import small_world as world

PROMPT = list(range(1, 31))  # 30 tokens, budget 8: evicted(30) = 20, so pages 0 to 4 stay raw


def page_of(world: World, name: str, index: int) -> int:
    return world.manager.get_block_ids(name)[0][index]


def hashed(world: World, name: str) -> list[bool]:
    """Whether each page of the request is in the prefix cache; freed pages are not listed."""
    return [world.pool.blocks[page].block_hash is not None for page in world.held(name)[0]]


def test_same_prompt_at_once_waits_a_step_instead_of_being_computed_twice():
    w = world()
    first, second = w.add(PROMPT, 10), w.add(PROMPT, 10)
    w.step()
    shared = w.held(first)[0][:5]
    assert second not in w.hits
    w.step()
    assert w.hits[second] == 28
    assert w.held(second)[0][:5] == shared, "these are never written"
    assert not set(w.held(first)[0]) & set(w.held(second)[0][5:])
    assert w.worker.num_copies == 2, "pages 5 and 6"
    w.run(30)
    w.check_empty()


def test_a_page_is_not_worth_a_step():
    w = world()
    w.add(PROMPT[:25], 10)
    second = w.add([*PROMPT[:21], 7, 7, 7, 7], 10)  # shares pages 0 to 4, of which 4 is rewritten
    w.step()
    assert w.hits[second] == 16
    w.run(30)
    w.check_empty()


FIND = inspect.signature(Scheduler._get_local_prefix_cache_hit).parameters


@pytest.mark.skipif("max_cache_hit_length" not in FIND, reason="vLLM 0.32 has no limit")
@pytest.mark.parametrize(
    ("limit", "hit", "at_once"), [(None, 28, 0), (28, 28, 0), (27, 24, 30), (9, 8, 18), (7, 4, 14)]
)
def test_a_hit_is_as_long_as_vllm_allows(limit, hit, at_once):
    """Nor does a request wait for pages that it may not hit; of 40 tokens a step 10 are left."""
    w = world()
    find = w.scheduler._get_local_prefix_cache_hit
    w.scheduler._get_local_prefix_cache_hit = lambda request, _: find(request, limit)
    first, second = w.add(PROMPT, 10), w.add(PROMPT, 10)
    w.step()
    assert w.requests[first].num_computed_tokens == 30
    assert w.requests[second].num_computed_tokens == at_once
    third = w.add(PROMPT, 1)
    w.run(30)
    assert w.hits[third] == hit
    w.check_empty()


def test_hit_on_pages_that_the_owner_will_rewrite_is_copied():
    w = world(budgets=((16, 0, 1),))
    owner = w.add(PROMPT[:10], 30)
    while w.requests[owner].num_computed_tokens < 13:
        w.step()
    known = list(w.requests[owner].all_token_ids)
    hitter = w.add([*known[:13], 50], 3)  # 17 tokens: evicts nothing itself
    w.step()
    assert w.hits[hitter] == 12
    assert w.worker.num_copies == 2
    shared = [page_of(w, owner, i) == page_of(w, hitter, i) for i in range(3)]
    assert shared == [True, False, False]
    w.run(60)
    w.check_empty()


def test_hit_on_pages_that_only_the_hitter_will_rewrite_is_copied():
    w = world()
    owner = w.add(PROMPT[:11], 1)  # leaves before it evicts
    w.run(5)
    reader = w.add([*PROMPT[:8], 50], 2)  # 11 tokens at most: evicts nothing
    writer = w.add([*PROMPT[:8], 51, 52, 53, 54], 20)  # evicts in the step that copies
    w.step()
    assert w.hits == {owner: 0, reader: 8, writer: 8}
    assert page_of(w, reader, 0) == page_of(w, writer, 0), "page 0 is written by neither"
    assert page_of(w, reader, 1) != page_of(w, writer, 1), "page 1 is written by one"
    assert w.worker.num_copies == w.worker.num_events == 1
    w.run(50)
    w.check_empty()


def test_pages_that_their_owner_rewrote_are_hit_as_raw_copies():
    w = world()
    w.add(PROMPT, 1)
    w.run(5)
    hitter = w.add(PROMPT, 10)
    w.step()
    assert w.hits[hitter] == 28
    assert w.worker.num_snapshots == 2, "pages 5 and 6, once"
    w.run(20)
    w.check_empty()


def test_without_pages_to_spare_nothing_is_copied_for_the_cache():
    w = world(num_pages=10)
    w.add(PROMPT, 1)
    w.run(5)
    hitter = w.add(PROMPT, 10)
    w.step()
    assert w.hits[hitter] == 20, "pages 0 to 4, which nobody rewrites"
    w.run(20)
    w.check_empty()


def test_pages_lose_their_hashes_with_the_first_compaction():
    w = world()
    name = w.add(PROMPT[:9], 30)
    w.step()
    assert hashed(w, name) == [True, True, False]
    while w.requests[name].num_computed_tokens < 11:
        w.step()
    assert hashed(w, name) == [True, True, False]
    w.step()  # 12 tokens: four are evicted; page 0 is never written
    assert hashed(w, name) == [True, False, False]
    w.step()
    assert w.held(name)[0] == [page_of(w, name, i) for i in (1, 2, 3)], "page 0 is free"
    late = w.add(PROMPT[:9], 30)
    w.step()
    assert w.hits[late] == 8, "page 0 is cached though it is free, of page 1 a copy"
    w.run(60)
    w.check_empty()


def test_owner_may_compact_while_its_shared_pages_are_read():
    w = world(budgets=((8, 0, 1), (16, 0, 1)))
    w.add(PROMPT, 20)
    w.step()
    hitter = w.add([*PROMPT, 7], 20)
    w.step()
    assert w.hits[hitter] == 28
    # Both go on; the worker compares each read with a private run.
    w.run(60)
    assert w.worker.num_events >= 4
    w.check_empty()


def test_output_of_an_earlier_turn_is_a_hit_as_far_as_it_is_raw():
    w = world(budgets=((24, 0, 1),))
    first = w.add(PROMPT[:10], 8)  # 18 tokens: all within the budget
    w.run(20)
    turn = [*w.requests[first].all_token_ids, 40, 41]
    assert len(turn) == 20
    second = w.add(turn, 40)
    w.step()
    assert w.hits[second] == 16  # 17 tokens were computed
    w.run(60)
    third = w.add([*w.requests[second].all_token_ids[:60], 42], 2)
    w.step()
    assert w.hits[third] == 28, "what was raw at the second turn's first eviction"
    w.run(10)
    w.check_empty()


def test_resumed_request_shares_what_it_will_not_rewrite():
    """It passes its first two evictions in one chunk: page 1 is never written."""
    w = world()
    name = w.add(PROMPT[:8], 50)
    for _ in range(30):
        w.step()
    w.scheduler.reset_prefix_cache(reset_running_requests=True)
    w.step()
    w.step()
    assert w.chunks[name][-2:] == [(0, 8), (8, 16)]
    sequence = w.scheduler.paged_managers[0]._sequences[name]
    assert (sequence.first_write, sequence.frozen) == (1, 2)
    reader = w.add(list(w.requests[name].all_token_ids[:9]), 2)
    w.step()
    assert w.hits[reader] == 8
    assert w.worker.num_copies == 0
    w.run(100)
    w.check_empty()


def test_copies_that_do_not_fit_are_computed_instead():
    """The pool holds one prompt: with its cached pages and their copies, more than the pool."""
    w = world(num_pages=12, max_len=48, batch=8)
    prompt = list(range(1, 45))  # 11 pages: all there are
    aborted = w.add(prompt, 4)
    for _ in range(5):
        w.step()
    w.abort(aborted)  # 40 tokens cached, raw, and free
    name = w.add(prompt, 4)
    w.step()
    assert 0 < w.hits[name] < 40
    w.run(30)
    w.check_empty()


def preempt(w: World) -> None:
    """The newest running request, as vLLM does for want of pages."""
    w.scheduler._preempt_request(w.scheduler.running.pop(), 0.0)
    w.scheduler.prev_step_scheduled_req_ids.clear()


def test_preempted_before_its_first_compaction_hits_its_own_raw_pages():
    w = world(num_pages=40, budgets=((16, 0, 1),), batch=12)
    name = w.add(PROMPT, 10)
    w.step()
    w.step()  # 24 of 30
    preempt(w)
    w.step()
    assert w.hits[name] == 24
    assert w.worker.num_copies == 6 - 3, "evicted(30) is 12: pages 3, 4 and 5 are rewritten"
    w.run(50)
    w.check_empty()


def test_resumed_request_takes_no_hit_beyond_its_prompt():
    """Raw pages of a longer prompt with the same tokens: it has evicted some of these itself."""
    w = world()
    name = w.add(PROMPT[:8], 50)
    for _ in range(25):
        w.step()
    other = w.add(list(w.requests[name].all_token_ids[:30]), 1)
    w.step()
    w.step()
    assert other not in w.scheduler.requests
    preempt(w)
    w.step()
    assert w.hits[name] == 4
    w.run(100)
    w.check_empty()


def test_preempted_request_is_raw_again():
    w = world(budgets=((16, 0, 1),))
    name = w.add(PROMPT[:10], 50)
    while w.requests[name].num_computed_tokens < 21:
        w.step()
    assert not all(hashed(w, name)[:2]), "rewritten"
    w.scheduler.reset_prefix_cache(reset_running_requests=True)
    w.step()
    assert hashed(w, name) == [True, True, False]
    w.run(60)
    w.check_empty()


def test_nothing_is_cached_with_compress_prefill():
    w = world(compress_prefill=True)
    first = w.add(PROMPT, 4)
    w.run(10)
    second = w.add(PROMPT, 4)
    w.run(10)
    assert w.hits == {first: 0, second: 0}
    w.check_empty()


def test_tokens_are_those_of_a_run_without_the_cache():
    prompts = [PROMPT, PROMPT, [*PROMPT, 3], PROMPT[:20]]
    tokens = []
    for caching in (True, False):
        w = world(caching=caching)
        names = [w.add(prompt, 20) for prompt in prompts]
        w.run(100)
        tokens.append([list(w.requests[name].output_token_ids) for name in names])
    assert tokens[0] == tokens[1]
    assert tokens[0][0][0] == next_token(PROMPT)
