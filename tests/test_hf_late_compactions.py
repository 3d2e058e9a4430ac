"""Compactions of pages that others have, too, without room for copies of them: they wait."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hf_errors import EARLY, PAGES, READ, TOKENS, begin
from hf_models import load
from hf_pressure import feed, one_by_one, waiting

from paged_kv.hf import PagedCache, PagePool, PoolFull


@pytest.fixture(scope="module")
def model() -> Any:
    return load("llama")


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "value_merge"])
def test_a_compaction_of_shared_pages_waits_for_room(policy, model):
    """Its pages are another cache's, too: it needs copies, of which a step alone needs fewer."""
    options = {**EARLY, "policy": policy, "start": "always"}
    with PagedCache(model.config, **options, **PAGES) as cache:
        expected = [feed(model, cache, TOKENS[:READ]), one_by_one(model, cache, TOKENS[READ:])]
        entries = cache.stats().entries
    # The context takes 4 * 5 pages; a copy's next compaction wants all of them.
    pool = PagePool(num_pages=4 * 8, page_size=16)
    with PagedCache(model.config, pool=pool, **options) as cache:
        assert torch.equal(feed(model, cache, TOKENS[:READ]), expected[0])
        other, found, refused = copy.deepcopy(cache), [], 0
        for place, token in enumerate(TOKENS[READ:]):
            before = cache.stats()
            try:
                found.append(feed(model, cache, [token]))
            except PoolFull:
                refused += 1
                assert cache.stats() == before
                assert cache.get_seq_length() == READ + place
                other.close()
                found.append(feed(model, cache, [token]))
            assert cache.get_seq_length() == READ + place + 1
        torch.testing.assert_close(torch.cat(found, 1), expected[1], atol=1e-5, rtol=1e-5)
        assert refused == 1
        assert cache.stats().entries == entries
        pool.check_integrity()
    assert pool.num_held == 0


def late(model: Any, policy: str = "snapkv") -> tuple[PagedCache, PagedCache, list[int]]:
    """A cache whose compaction waits, one that has its pages, and the tokens that follow."""
    pool = PagePool(num_pages=4 * 8, page_size=16)
    cache = PagedCache(model.config, pool=pool, **{**EARLY, "policy": policy})
    feed(model, cache, TOKENS[:READ])
    other = copy.deepcopy(cache)
    for place, token in enumerate(TOKENS[READ:]):
        feed(model, cache, [token])
        if cache.sequences.is_late:
            return cache, other, TOKENS[READ + place + 1 :]
    raise AssertionError("no compaction came")


def test_what_waits_can_be_copied_cropped_and_joined_by_a_turn(model):
    """As if there had been no compaction yet: a turn of several tokens puts it off further."""
    cache, other, rest = late(model)
    length = cache.get_seq_length()
    third = copy.deepcopy(cache)
    assert third.sequences.is_late
    with pytest.raises(PoolFull, match="a compaction of sequences that share pages"):
        feed(model, third, rest[:1])
    third.close()
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    other.close()
    again = TOKENS[length - 2 : length]
    found = one_by_one(model, cache, [*again, *rest])
    with PagedCache(model.config, **EARLY, **PAGES) as alone:
        feed(model, alone, TOKENS[:READ])
        expected = one_by_one(model, alone, TOKENS[READ:])
    torch.testing.assert_close(found, expected[:, length - 2 - READ :], atol=1e-5, rtol=1e-5)
    assert not cache.sequences.is_late


def test_a_turn_of_several_tokens_does_not_lose_what_waits(model):
    cache, other, rest = late(model)
    other.close()
    feed(model, cache, rest[:5])
    one_by_one(model, cache, rest[5:])
    assert not cache.sequences.is_late
    assert cache.sequences.size.max() < 80 + 16


def test_a_cache_that_has_shrunk(model):
    """It is held to its budget from then on, as soon as there is room."""
    pool = PagePool(num_pages=4 * 9, page_size=16)
    options = {"policy": "streaming", "budget": 64}
    with waiting(model, pool, **options) as cache:
        begin(model, cache)
        cache.sequences.shrink(np.array([0]))  # as if pages had run out
        with copy.deepcopy(cache) as other:
            for token in TOKENS[READ + 1 :]:
                try:
                    feed(model, cache, [token])
                except PoolFull:
                    break
            assert cache.sequences.is_late
            length = cache.get_seq_length()
            other.close()
        one_by_one(model, cache, TOKENS[length:])
        assert not cache.sequences.is_late
        assert cache.sequences.size.max() < 64 + 16
        pool.check_integrity()


def test_where_crop_was_waited_for(model):
    """It compacts then, or at a later one; what it takes back is gone in any case."""
    pool = PagePool(num_pages=4 * 8 + 3, page_size=16)
    with PagedCache(model.config, pool=pool, **EARLY) as cache:
        feed(model, cache, TOKENS[:READ])
        with copy.deepcopy(cache) as other:
            cache.activate_past_recording()
            feed(model, cache, TOKENS[READ : READ + 20])
            cache.crop(-1)
            assert cache.sequences.is_late
            assert cache.get_seq_length() == READ + 19
            other.close()
        cache.crop(0)
        assert not cache.sequences.is_late
        assert cache.sequences.size.max() < 80 + 16
