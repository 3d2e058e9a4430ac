"""start=pressure: nothing is dropped while there are pages; then rows shrink, once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from hf_models import load, padded, prompt
from hf_pressure import (
    PROMPT,
    feed,
    has_shrunk,
    one_by_one,
    start_of,
    tokens_of,
    told,
    waiting,
)
from policy_cases import CASES
from reference_loop import Rule, Sequence_, load_model

from paged_kv.core.schedule import NEVER
from paged_kv.hf import PagedCache, PagePool, PoolFull

NAMED = [(name, options) for name, several in CASES.items() for options in several]
LAYERS = 6
ROOM = 6  # pages of a layer: full at 192 tokens
SNAPKV = {"policy": "snapkv", "budget": 100, "observation_window": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


# ---- what a row gives


@pytest.mark.parametrize("name", ["streaming", "snapkv", "pyramidal+snapkv", "cluster"])
def test_with_room_for_all_it_is_full(name, model):
    """Bit for bit; also without a limit, where nothing is ever dropped."""
    tokens = tokens_of(0)
    for limit in (LAYERS * 8, None):
        found = {}
        for policy, options in [("full", {}), (name, {"start": "pressure", "budget": 150})]:
            pool = PagePool(limit)
            with PagedCache(model.config, policy, pool=pool, **options) as cache:
                found[policy] = [
                    feed(model, cache, tokens[:PROMPT]),
                    one_by_one(model, cache, tokens[PROMPT:]),
                ]
                assert cache.stats().evicted == cache.stats().shrunk == 0
                assert pool.num_held == LAYERS * 8
        for ours, full in zip(found[name], found["full"], strict=True):
            assert torch.equal(ours, full)


def check(model: Any, options: dict[str, Any], page_size: int = 32, start: int = 192) -> None:
    """A pool that is full at 192 tokens; the reference engine is told so."""
    tokens = tokens_of(0)
    pool = PagePool(LAYERS * start // page_size, page_size)
    with waiting(model, pool, **options) as cache:
        logits = feed(model, cache, tokens[:PROMPT])
        found = torch.cat([logits, one_by_one(model, cache, tokens[PROMPT:])], 1)[0]
        stats = cache.stats()
        assert start_of(cache) == start
    chunks = [tokens[:PROMPT], *([token] for token in tokens[PROMPT:])]
    expected = told(model, options, page_size, start, chunks)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    assert (stats.shrunk, stats.shrunk_entries > 0) == (1, True)
    assert stats.shrunk_entries <= stats.evicted
    pool.check_integrity()


@pytest.mark.every_policy
@pytest.mark.parametrize(
    ("name", "options"), NAMED, ids=[f"{name} {options}" for name, options in NAMED]
)
def test_policies(name, options, model):
    check(model, {"policy": name, "budget": 100, **options})


@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o", "value_merge"])
def test_pyramids_fractions_and_pages_of_other_sizes(name, model):
    check(model, {"policy": f"pyramidal+{name}", "budget": 130})
    check(model, {"policy": name, "budget": 100, "skip_layers": [3]}, start=224)
    check(model, {"policy": name, "budget": 0.5, "min_budget": 80})
    check(model, {"policy": name, "budget": 100}, page_size=16)


def test_statistics_that_are_gathered(model):
    """Until a row shrinks."""
    check(model, {"policy": "calibrated_attention", "budget": 100, "statistics": "gathered"})


@torch.inference_mode()
def test_streaming_is_the_plain_loop(model):
    """Which shares no code with this package."""
    tokens, loop = tokens_of(1), Sequence_(model, Rule([100] * LAYERS), 192)
    with waiting(model, PagePool(LAYERS * ROOM), policy="streaming", budget=100) as cache:
        for chunk in [tokens[:PROMPT], *([token] for token in tokens[PROMPT:])]:
            found = feed(model, cache, chunk)[0]
            torch.testing.assert_close(found, loop.logits(loop.process(chunk)), atol=3e-4, rtol=0)
            loop.drop()
        assert start_of(cache) == 192


@pytest.mark.parametrize(
    ("policy", "page_format", "residual"),
    [("streaming", "int8", 0), ("snapkv", "int4", 1), ("h2o", "fp8", 0), ("pooling", "int8", 1)],
)
def test_packed_pages(policy, page_format, residual):
    """What rounding alone makes of codes on a border is much less than what a format does."""
    model, tokens, found = load("llama"), tokens_of(2, 160), {}
    chunks = [tokens[:80], *([token] for token in tokens[80:])]
    for name in (page_format, "native"):
        options = {"policy": policy, "budget": 80, "page_format": name}
        options["residual_pages"] = residual if name != "native" else 0
        found[name] = told(model, options, 16, 112, chunks)
        if name == page_format:
            with waiting(model, PagePool(4 * 7, 16), **options) as cache:
                logits = feed(model, cache, chunks[0])
                ours = torch.cat([logits, one_by_one(model, cache, tokens[80:])], 1)[0]
                assert start_of(cache) == 112
    error, other = ((each - found[page_format]).abs().mean() for each in (ours, found["native"]))
    assert error < 0.1 * other


def test_rows_of_a_batch_shrink_one_by_one():
    """Padded rows: the longer one has the larger surplus."""
    model, options = load("llama"), {**SNAPKV, "budget": 80}
    rows = [prompt(120), prompt(101, seed=1)]
    more = [prompt(60, seed=2), prompt(60, seed=3)]
    inputs = padded(rows)
    with waiting(model, PagePool(4 * 16, 16), **options) as cache, torch.no_grad():
        logits = [model(**inputs, past_key_values=cache).logits]
        mask = inputs["attention_mask"]
        for step in zip(*more, strict=True):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            logits.append(feed(model, cache, *([token] for token in step), mask=mask))
        starts = cache.sequences.starts.tolist()
        assert starts == [131, 160]
        assert cache.stats().shrunk == 2
    found = torch.cat(logits, 1)
    for row, tokens in enumerate(rows):
        chunks = [tokens, *([token] for token in more[row])]
        expected = told(model, options, 16, starts[row], chunks)
        ours = found[row, 120 - len(tokens) :]
        torch.testing.assert_close(ours, expected, atol=3e-4, rtol=0)


def test_a_turn_of_several_tokens_makes_room_before_it(model):
    """What came before it shrinks; the turn itself is held whole until its end, as a prompt."""
    tokens = tokens_of(3)
    with waiting(model, PagePool(LAYERS * ROOM), **SNAPKV) as cache:
        feed(model, cache, tokens[:PROMPT])
        one_by_one(model, cache, tokens[PROMPT:180])
        feed(model, cache, tokens[180:240])
        assert start_of(cache) == NEVER, "a prompt has not ended"
        assert cache.sequences.size[:, 0].tolist() == [180 - 64 + 60] * LAYERS
        one_by_one(model, cache, tokens[240:])
        assert start_of(cache) == 180
        assert cache.sequences.size.max() <= 100 + 31


# ---- who shrinks


def test_the_cache_that_holds_more_shrinks_first(model):
    pool, tokens = PagePool(LAYERS * 12), tokens_of(0)
    with waiting(model, pool, **SNAPKV) as small, waiting(model, pool, **SNAPKV) as large:
        feed(model, small, tokens[:140])
        feed(model, large, tokens[:200])
        one_by_one(model, large, tokens[200:202])
        one_by_one(model, small, tokens[140:160])
        assert not any(has_shrunk(small) + has_shrunk(large))
        one_by_one(model, small, [tokens[160]])  # a sixth page, of which there are five
        assert (has_shrunk(small), has_shrunk(large)) == ([False], [True])
        assert start_of(large) == 202
        one_by_one(model, small, tokens[161:230])
        assert has_shrunk(small) == [False], "only as many as needed"
        pool.check_integrity()


def test_of_equal_ones_the_oldest(model):
    pool, tokens = PagePool(LAYERS * 10), tokens_of(0)
    caches = [waiting(model, pool, **SNAPKV) for _ in range(2)]
    for cache in caches:
        feed(model, cache, tokens[:140])
        one_by_one(model, cache, tokens[140:160])
    one_by_one(model, caches[1], [tokens[160]])
    assert [has_shrunk(cache) for cache in caches] == [[True], [False]]
    for cache in caches:
        cache.close()


def test_full_only_when_all_are_at_their_budgets(model):
    pool, tokens = PagePool(LAYERS * 9), tokens_of(0)
    with waiting(model, pool, **SNAPKV) as one, waiting(model, pool, **SNAPKV) as other:
        for cache in (one, other):
            feed(model, cache, tokens[:140])
            one_by_one(model, cache, tokens[140:142])
        assert has_shrunk(one) + has_shrunk(other) == [True, False]
        with PagedCache(model.config, "full", pool=pool) as full:
            before = one.stats(), other.stats()
            with pytest.raises(PoolFull, match="no sequence is left that could shrink"):
                feed(model, full, tokens[:100])
        assert before[0] == one.stats()
        assert has_shrunk(other) == [True]
        one_by_one(model, one, tokens[142:143])
    assert pool.num_held == 0


def test_a_prompt_does_not_shrink(model):
    """Before a single token has come it is one: as under always."""
    pool, tokens = PagePool(LAYERS * 6), tokens_of(0)
    with waiting(model, pool, **SNAPKV) as one, waiting(model, pool, **SNAPKV) as other:
        feed(model, one, tokens[:PROMPT])
        with pytest.raises(PoolFull):
            feed(model, other, tokens[:40])
        assert not any(has_shrunk(one))
        one_by_one(model, one, tokens[PROMPT : PROMPT + 1])
        feed(model, other, tokens[:40])
        assert start_of(one) == PROMPT + 1


def test_shared_pages_are_not_worth_a_copy(model):
    pool, tokens = PagePool(LAYERS * 8), tokens_of(0)
    with waiting(model, pool, **SNAPKV) as one:
        feed(model, one, tokens[:PROMPT])
        one_by_one(model, one, tokens[PROMPT:160])
        with copy.deepcopy(one) as other:
            with pytest.raises(PoolFull), PagedCache(model.config, "full", pool=pool) as full:
                feed(model, full, tokens[:128])
            assert not any(has_shrunk(one) + has_shrunk(other))
        with PagedCache(model.config, "full", pool=pool) as full:
            feed(model, full, tokens[:128])
        assert has_shrunk(one) == [True]
