"""generate_batch with start=pressure: who shrinks, that nobody is sent back before, what comes out.

The reference engine is told from how many tokens on each request was held to its budget.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
from hf_models import load, prompt
from hf_questions import OF_LLAMA

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import NEVER, Schedule
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagePool, PoolFull, generate_batch
from paged_kv.hf.batch import engine, generate
from paged_kv.hf.batch.page_counts import PageCounts

LENGTHS = (5, 120, 33, 200, 1, 150)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
LAYERS, PAGE, NEW, BUDGET = 4, 16, 72, 96
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "progress_bar": False}
POLICIES: dict[str, dict[str, Any]] = {
    "streaming": {},
    "snapkv": {"observation_window": 16},
    "h2o": {},
    "pyramidal+calibrated_attention": {"statistics": OF_LLAMA, "fading": "on"},
    "pyramidal+snapkv": {"observation_window": 16},
    "value_merge": {"of": "h2o"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return load("llama")


@pytest.fixture
def seen(monkeypatch):
    """What happens inside."""
    found: dict[str, Any] = {"preempted": [], "left": [], "together": 0, "given": {}}

    class Pool(PagePool):
        def __init__(self, *args):
            super().__init__(*args)
            found["pool"] = self

    class Cache(engine.BatchCache):
        def __init__(self, *args):
            super().__init__(*args)
            found["starts"] = self.starts
            self.starts._shrunk.update(found["given"])

        def free_blocks(self, request_id, no_cache=False):
            if no_cache:
                found["preempted"].append(request_id)
                found["left"] += self.above()
            super().free_blocks(request_id, no_cache)

        def above(self):
            """Running requests past their prompts that could still shrink."""
            return [
                request
                for row, request in enumerate(self.rows)
                if self.starts.of(request) == NEVER
                and request not in self._gone | set(self._floor)
                and self.page_counts.surplus(int(self.parts[0].num_tokens[row])) > 0
            ]

        def step(self, requests):
            found["together"] = max(found["together"], len(requests))
            return super().step(requests)

    monkeypatch.setattr(generate, "PagePool", Pool)
    monkeypatch.setattr(generate, "BatchCache", Cache)
    return found


def run(model: Any, policy: str, num_pages: int | None, **more: Any) -> list[list[int]]:
    """What generate_batch says; num_pages: for each layer."""
    limits = {"num_pages": num_pages and num_pages * LAYERS, "max_batch_tokens": 64}
    options = {**options_of(policy), "start": "pressure", "page_size": PAGE}
    return generate_batch(model, **{"prompts": PROMPTS} | options | limits | GREEDY | more)


def options_of(policy: str) -> dict[str, Any]:
    return {"policy": policy, "budget": BUDGET, **POLICIES[policy]}


@cache
def told(name: str, policy: str, index: int, start: int, count: int = NEW) -> list[int]:
    """The tokens of the reference engine that is held to its budget from start on."""
    config = CompressionConfig.from_dict(options_of(policy))
    reference = ReferenceEngine(load(name), config, PAGE, start)
    chunk, found = PROMPTS[index], []
    for _ in range(count):
        logits = reference.logits(reference.process(chunk)[-1:])
        found.append(int(logits.argmax()))
        chunk = found[-1:]
    return found


def check(found: list[list[int]], seen: dict[str, Any], policy: str, name: str = "llama") -> None:
    """The tokens that the starts make; the pool is empty."""
    for index, tokens in enumerate(found):
        start = seen["starts"].of(str(index))
        assert tokens == told(name, policy, index, start), (index, start)
    seen["pool"].check_integrity()
    assert seen["pool"].num_held == 0


def num_shrunk(seen: dict[str, Any]) -> int:
    return sum(seen["starts"].of(str(index)) < NEVER for index in range(len(PROMPTS)))


@pytest.mark.parametrize("policy", ["streaming", "pyramidal+snapkv"])
@pytest.mark.parametrize("num_pages", [60, None])
def test_with_room_for_all_it_is_full(policy, num_pages, model, seen):
    full = run(model, policy, num_pages)
    assert num_shrunk(seen) == 0
    assert full == generate_batch(model, PROMPTS, "full", page_size=PAGE, **GREEDY)


@pytest.mark.every_policy
@pytest.mark.parametrize("policy", POLICIES)
def test_some_shrink_and_nobody_is_sent_back(policy, model, seen):
    check(run(model, policy, 44), seen, policy)
    assert 0 < num_shrunk(seen) < len(PROMPTS)
    assert not seen["preempted"]
    assert seen["together"] == len(PROMPTS)


@pytest.mark.every_policy
@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_sent_back_gives_the_same(policy, model, seen):
    """When all who run are at their budgets, and not before."""
    check(run(model, policy, 20), seen, policy)
    assert seen["preempted"]
    assert seen["left"] == []


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("num_pages", [44, 20])
def test_other_models(name, num_pages, seen):
    """Layers with a sliding window keep that, with or without need."""
    check(run(load(name), "h2o", num_pages), seen, "h2o", name)
    assert num_shrunk(seen)
    assert seen["left"] == []


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_a_residual_shows_each_token_what_it_saw_before(policy, model, seen):
    options = {"page_format": "int4", "residual_pages": 1}
    found = run(model, policy, 20, **options)
    assert seen["preempted"]
    starts = {str(index): seen["starts"].of(str(index)) for index in range(len(PROMPTS))}
    for index, tokens in enumerate(PROMPTS):
        seen["given"] = {"0": starts[str(index)]}
        assert run(model, policy, None, prompts=[tokens], **options) == [found[index]]


def test_one_that_waits_gets_room(model, seen):
    """13 and 10 pages are too many for 20, but not 6 and 10."""
    found = run(model, "streaming", 20, prompts=[PROMPTS[3], PROMPTS[5]], max_requests=2)
    starts = [seen["starts"].of(request) for request in "01"]
    assert found == [told("llama", "streaming", at, starts[row]) for row, at in enumerate((3, 5))]
    assert starts[0] < 210, "the first shrank soon after its prompt"
    assert seen["together"] == 2
    assert not seen["preempted"]


def test_the_largest_surplus_shrinks_first(model, seen):
    run(model, "streaming", 32, prompts=[PROMPTS[5], PROMPTS[3]], max_new_tokens=110)
    assert seen["starts"].of("0") == NEVER
    assert 200 < seen["starts"].of("1") < 309


def test_room_is_made_where_transformers_keeps_some_free(model, seen):
    """18 of 20 pages are taken, and transformers begins nothing in the last 15 percent."""
    run(model, "streaming", 20, prompts=[prompt(280), PROMPTS[0]])
    assert seen["together"] == 2
    assert 280 <= seen["starts"].of("0") < 288


def test_windows_are_counted_as_they_may_be_computed_again():
    """In steps that are longer than the prompt, if a request has no start."""
    window = Schedule(8, 16, compress_prefill=True)
    page_counts = PageCounts([window], 8, None, 64, waits=True)
    assert page_counts.peak(60, 3) == page_counts.peak(60, NEVER) == 8


def test_nobody_shrinks_for_one_that_would_not_fit(model, seen):
    """A prompt of 200 tokens needs 13 of 18 pages: the first one keeps its 10 while it needs no
    more, since even its budget's 7 would leave 11."""
    run(model, "streaming", 18, prompts=[PROMPTS[5], PROMPTS[3]], max_new_tokens=10)
    assert seen["starts"].of("0") == NEVER
    assert seen["together"] == 1


def test_alone_in_the_least_pool(model, seen):
    """Under pressure a request needs what it needs under always."""
    (found,) = run(model, "streaming", 13, prompts=[PROMPTS[3]])
    assert found == told("llama", "streaming", 3, 208)
    with pytest.raises(PoolFull, match="too small: prompt 0"):
        run(model, "streaming", 12, prompts=[PROMPTS[3]])


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(seed, model, seen):
    """Pools from the least one on, and limits of all kinds."""
    random = Random(seed)
    policy = random.choice(["streaming", "snapkv", "pyramidal+snapkv"])
    limits = {
        "max_requests": random.choice([2, 4, 64]),
        "max_batch_tokens": random.choice([16, 64, 512]),
    }
    found = run(model, policy, random.randint(14, 30), **limits)
    check(found, seen, policy)
    assert seen["left"] == []
