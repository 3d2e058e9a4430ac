"""What the live page is told of the pool, by hand and against the pool."""

from __future__ import annotations

import json
import random

import engines  # noqa: F401, sets vLLM's environment before it is imported
import numpy as np
import pytest
from random_worlds import random_prompt, random_rules
from world_rules import max_prompt_len
from worlds import World, small_world

from paged_kv.vllm.scheduler import page_map
from paged_kv.vllm.scheduler.page_map import GROUP, KINDS, PageMap

PROMPT = list(range(1, 25))


def made(world: World, tmp_path, recent_window: int = 4) -> PageMap:
    return PageMap(world.scheduler, tmp_path / "engine-0", recent_window)


def told(pages: np.ndarray, ids: list[int]) -> list[tuple[int, str]]:
    """(layer group, kind) of these pages."""
    return [(int(pages[id_ - 1]) // GROUP, KINDS[pages[id_ - 1] % GROUP]) for id_ in ids]


def counted(pages: np.ndarray) -> dict[str, int]:
    return {kind: int((pages % GROUP == place).sum()) for place, kind in enumerate(KINDS)}


def test_a_prompt_its_output_and_what_is_left_of_both(tmp_path):
    """Pages of 4; the first group keeps 8 entries, the second everything."""
    world = small_world(budgets=((8, 0, 1),), full_groups=1, caching=False)
    pages = made(world, tmp_path)
    name = world.add(PROMPT, 30)
    assert set(pages.pages()) == {0}
    assert len(pages.pages()) == 59  # without the null page
    world.step()  # the prompt: 6 pages; the schedule keeps 8 of 24, and pages are freed in a step
    first, second = world.held(name)
    assert told(pages.pages(), second) == [(1, "prompt")] * 6
    assert told(pages.pages(), first) == [(0, "survivors")] * 5 + [(0, "newest")]
    for _ in range(5):
        world.step()  # 24 + 5 tokens: slots 20 to 28 in the first group
    first, second = world.held(name)
    assert world.requests[name].num_computed_tokens == 29
    assert told(pages.pages(), first) == [(0, "survivors")] + [(0, "newest")] * 2
    assert told(pages.pages(), second) == [(1, "prompt")] * 6 + [(1, "newest")] * 2
    assert counted(pages.pages()) == {
        **dict.fromkeys(KINDS, 0),
        "free": 48,
        "survivors": 1,
        "prompt": 6,
        "newest": 4,
    }
    (row,) = pages.snapshot()["requests"]
    assert row == {
        "number": 1,
        "prompt": 24,
        "computed": 29,
        "pages": [3, 8],
        "has_dropped": True,
        "preemptions": 0,
    }
    world.run(60)
    assert set(pages.pages()) == {0}
    assert pages.snapshot()["requests"] == []


@pytest.mark.parametrize(("recent", "newest"), [(0, 1), (1, 1), (2, 2), (5, 2), (6, 3), (99, 3)])
def test_newest_pages_have_entries_of_the_recent_window(recent, newest, tmp_path):
    world = small_world(budgets=((8, 0, 1),), caching=False)
    name = world.add(PROMPT, 30)
    for _ in range(6):
        world.step()  # slots 20 to 28: one entry in the last page
    found = told(made(world, tmp_path, recent).pages(), world.held(name)[0])
    assert found == [(0, "survivors")] * (3 - newest) + [(0, "newest")] * newest


def test_a_request_that_shrinks_later_has_a_prompt_and_output_before(tmp_path):
    world = small_world(budgets=((8, 0, 1),), caching=False, pressure=True)
    pages = made(world, tmp_path)
    name = world.add(PROMPT[:22], 30)
    for _ in range(6):
        world.step()  # 22 + 5 tokens: the sixth page has both, and counts as the prompt's
    assert told(pages.pages(), world.held(name)[0]) == [(0, "prompt")] * 6 + [(0, "newest")]
    assert pages.snapshot()["requests"][0]["has_dropped"] is False


def test_shared_cached_and_copied_pages(tmp_path):
    world = small_world(budgets=((16, 0, 1),), full_groups=1, max_len=96, num_pages=80)
    pages = made(world, tmp_path)
    world.add(PROMPT, 1)
    world.run(20)
    found = pages.pages()
    assert counted(found)["cached"] == sum(b.block_hash is not None for b in world.pool.blocks)
    assert counted(found)["cached"] + counted(found)["free"] == 79
    by_group = {group: int((found == group * GROUP + 1).sum()) for group in (0, 1)}
    assert min(by_group.values()) >= 4, "both groups left pages in the prefix cache"
    names = [world.add(PROMPT + [50 + n] * 9, 20) for n in range(2)]
    world.step()
    found = pages.pages()
    first, second = (world.held(name)[1] for name in names)
    common = [page for page in first if page in second]
    assert len(common) == 6
    assert told(found, common) == [(1, "shared")] * 6
    assert told(found, first[6:]) == [(1, "prompt")] * (len(first) - 6)


def test_a_page_that_no_request_holds_and_that_is_not_free(tmp_path):
    """A copy for the prefix cache, while the step that makes it is under way."""
    world = small_world(asynchronous=True)
    watch = made(world, tmp_path)
    name = world.add(PROMPT, 8)
    world.step()
    copies = [
        snapshot.copy.block_id
        for manager in world.paged_managers
        for snapshot in manager.cached_pages.snapshots._in_flight
    ]
    assert copies
    assert told(watch.pages(), copies) == [(0, "moving")] * len(copies)
    assert counted(watch.pages())["free"] == world.num_free == 59 - 6 - len(copies)
    assert len(world.held(name)[0]) == 6


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("pressure", [False, True])
def test_counts_agree_with_the_pool_in_random_worlds(asynchronous, pressure, tmp_path):
    seen = dict.fromkeys(KINDS, 0)
    for seed in range(8):
        for kind, count in _watched_world(seed, tmp_path, asynchronous, pressure).items():
            seen[kind] += count
    missing = {kind for kind, count in seen.items() if not count}
    assert missing <= {"moving"}, "the others all occur"


def _watched_world(seed: int, tmp_path, asynchronous: bool, pressure: bool) -> dict[str, int]:
    rng = random.Random(seed)
    world = World(random_rules(rng, asynchronous=asynchronous, pressure=pressure), seed=seed)
    watch = made(world, tmp_path)
    longest = max_prompt_len(world.rules, world.scheduler)
    seen = dict.fromkeys(KINDS, 0)
    for _ in range(6):
        prompt = random_prompt(rng, world, longest)
        world.add(prompt, rng.randint(1, world.rules.max_len - len(prompt) + 3))
        for _ in range(rng.choice([1, 3, 20])):
            world.step()
            _check(world, watch, seen)
    world.run(3 * world.rules.max_len * len(world.requests))
    _check(world, watch, seen)
    return seen


def _check(world: World, watch: PageMap, seen: dict[str, int]) -> None:
    pages, blocks = watch.pages(), world.pool.blocks[1:]
    counts = counted(pages)
    assert counts["free"] + counts["cached"] == world.num_free
    assert counts["shared"] == sum(b.ref_cnt > 1 for b in blocks)
    assert counts["cached"] == sum(b.ref_cnt == 0 and b.block_hash is not None for b in blocks)
    for group, manager in enumerate(world.manager.coordinator.single_type_managers):
        held = {b.block_id for row in manager.req_to_blocks.values() for b in row if not b.is_null}
        assert all(each == group for each, _ in told(pages, sorted(held)))
    rows = watch.snapshot()["requests"]
    assert [row["pages"] for row in rows] == [
        [len(pages) for pages in world.held(request.request_id)]
        for request in world.scheduler.running
    ]
    for kind, count in counts.items():
        seen[kind] += count


def test_the_hash_of_a_page_ends_with_its_layer_group():
    from vllm.v1.core.kv_cache_utils import get_group_id, make_block_hash_with_group_id

    for group in (0, 3, 7):
        key = make_block_hash_with_group_id(bytes(range(32)), group)
        assert key[-1] == group == get_group_id(key)


def test_more_requests_than_rows_and_their_numbers(tmp_path, monkeypatch):
    """Numbers are ours: a request's id can be anything that a user chose."""
    monkeypatch.setattr(page_map, "MAX_ROWS", 2)
    world = small_world(seqs=3)
    watch = made(world, tmp_path)
    for n in range(5):
        world.add(PROMPT[:8], [2, 9, 9, 9, 9][n], name=f"secret-{n}")
    world.step()
    snapshot = watch.snapshot()
    assert [row["number"] for row in snapshot["requests"]] == [1, 2]
    assert (snapshot["running"], snapshot["left_out"], snapshot["waiting"]) == (3, 1, 2)
    assert "secret" not in json.dumps(snapshot)
    for _ in range(3):
        world.step()
    assert [row["number"] for row in watch.snapshot()["requests"]] == [2, 3]
