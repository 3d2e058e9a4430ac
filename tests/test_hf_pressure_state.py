"""What has shrunk stays so: in copies, files, rows that move, after a crop, and where it shares."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hf_generate import NEW
from hf_models import load, padded, prompt
from hf_pressure import feed, has_shrunk, one_by_one, start_of, told, waiting

from paged_kv.core.schedule import NEVER
from paged_kv.hf import PagedCache, PagePool, PoolFull, enable

LAYERS, PAGE = 4, 16
PROMPT, MORE = prompt(120), prompt(60, seed=1)
FOLLOW = prompt(40, seed=2)
POLICIES = {
    "snapkv": {"policy": "snapkv", "budget": 80, "observation_window": 16},
    "h2o": {"policy": "pyramidal+h2o", "budget": 80},
    "int4": {"policy": "snapkv", "budget": 80, "page_format": "int4", "residual_pages": 1},
    "spill": {"policy": "snapkv", "budget": 80, "spill": True, "spill_interval": 0},
}


@pytest.fixture(scope="module")
def model():
    return load("llama")


def shrunk_cache(model, name, num_pages=10):
    """150 tokens were in a pool of so many pages for each layer; then others needed them."""
    pool = PagePool(LAYERS * num_pages, PAGE)
    cache = waiting(model, pool, **POLICIES[name])
    feed(model, cache, PROMPT)
    one_by_one(model, cache, MORE[:30])
    assert not any(has_shrunk(cache))
    with PagedCache(model.config, "full", pool=pool) as other:
        feed(model, other, prompt(10 + 16 * (num_pages - 10)))
        assert has_shrunk(cache) == [True]
    return cache


def expected_of(model, name, tokens=FOLLOW):
    """What follows 150 tokens, by a cache that is told when it will shrink."""
    with waiting(model, PagePool(None, PAGE), **POLICIES[name]) as cache:
        feed(model, cache, PROMPT)
        cache.sequences.pressed[:] = 150
        one_by_one(model, cache, MORE[:30])
        assert cache.stats().evicted > 0
        return one_by_one(model, cache, tokens)


@pytest.mark.parametrize("name", POLICIES)
def test_copies_and_files(name, model, tmp_path):
    cache, expected = shrunk_cache(model, name), expected_of(model, name)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PagedCache.load(
        tmp_path / "cache.safetensors", model.config, pool=PagePool(LAYERS * 20, PAGE)
    )
    with cache, loaded, copy.deepcopy(loaded) as copied:
        assert start_of(cache) == start_of(loaded) == start_of(copied) == 150
        assert cache.stats() == loaded.stats()
        for each in (copied, cache, loaded):
            torch.testing.assert_close(one_by_one(model, each, FOLLOW), expected)
            assert each.stats().shrunk == 1


@pytest.mark.parametrize("name", POLICIES)
def test_copies_and_files_of_what_has_not_shrunk(name, model, tmp_path):
    """They shrink by themselves."""
    with waiting(model, PagePool(LAYERS * 40, PAGE), **POLICIES[name]) as cache:
        feed(model, cache, PROMPT)
        one_by_one(model, cache, MORE[:30])
        cache.save(tmp_path / "cache.safetensors")
        copied = copy.deepcopy(cache)
        assert start_of(copied) == start_of(cache) == NEVER
    pool = PagePool(LAYERS * 10, PAGE)
    with PagedCache.load(tmp_path / "cache.safetensors", model.config, pool=pool) as loaded:
        found = one_by_one(model, loaded, [*MORE[30:], *FOLLOW])
        assert start_of(loaded) == 160
    chunks = [PROMPT, *([token] for token in [*MORE, *FOLLOW])]
    if name in ("snapkv", "h2o"):
        expected = told(model, POLICIES[name], PAGE, 160, chunks)[-70:]
        torch.testing.assert_close(found[0], expected, atol=3e-4, rtol=0)
    with copied:
        one_by_one(model, copied, MORE[30:])
        assert start_of(copied) == NEVER


@pytest.mark.parametrize("name", POLICIES)
def test_crop_goes_back_to_what_was_left(name, model):
    """And not behind that."""
    cache = shrunk_cache(model, name)
    with cache:
        left, answer = cache.stats().entries, [5, 6, 7]
        feed(model, cache, answer)
        one_by_one(model, cache, [8, 9])
        cache.crop(-5)
        assert cache.stats().entries == left
        torch.testing.assert_close(
            one_by_one(model, cache, FOLLOW), expected_of(model, name), atol=1e-4, rtol=1e-4
        )
    cache = shrunk_cache(model, name)
    with cache, pytest.raises(ValueError, match="for good"):
        cache.crop(-1)


def test_a_mark_of_before_is_forgotten(model):
    """h2o's scores lie elsewhere after a cache has shrunk where its last answer began."""
    pool, options = PagePool(LAYERS * 10, PAGE), POLICIES["h2o"]
    with waiting(model, pool, **options) as cache:
        feed(model, cache, PROMPT)
        one_by_one(model, cache, MORE[:30])
        feed(model, cache, [5, 6, 7])
        one_by_one(model, cache, [8])
        cache.crop(-4)
        with PagedCache(model.config, "full", pool=pool) as other:
            feed(model, other, prompt(10))
        assert start_of(cache) == 150
        one_by_one(model, cache, [9])
        with pytest.raises(ValueError, match="scores of that time have been overwritten"):
            cache.crop(-1)


def test_full_and_then_again(model):
    """A step that found no room can be tried again; a crop of nothing is none."""
    pool = PagePool(LAYERS * 10, PAGE)
    with waiting(model, pool, **POLICIES["snapkv"]) as cache:
        feed(model, cache, PROMPT)
        one_by_one(model, cache, MORE[:40])
        with PagedCache(model.config, "full", pool=pool) as other:
            with pytest.raises(PoolFull):
                feed(model, cache, prompt(200))
            assert start_of(cache) == 160
            cache.crop(0)
            feed(model, other, prompt(40))
            one_by_one(model, cache, MORE[40:])
    assert pool.num_held == 0


def test_a_crop_lets_no_row_of_its_own_shrink(model):
    """It needs copies of what the first row shares; the second one could make room for them."""
    pool, options = PagePool(LAYERS * 31, PAGE), POLICIES["h2o"]
    with waiting(model, pool, **options) as cache:
        feed(model, cache, PROMPT, PROMPT[::-1])
        one_by_one(model, cache, MORE[:30], MORE[:30])
        feed(model, cache, [5, 6], [5, 6])
        one_by_one(model, cache, [7], [7])
        with copy.deepcopy(cache) as shared, PagedCache(model.config, "full", pool=pool) as full:
            shared.batch_select_indices(torch.tensor([True, False]))
            feed(model, full, prompt(80))
            before = cache.stats()
            with pytest.raises(PoolFull):
                cache.crop(-3)
            assert cache.stats() == before
            assert not any(has_shrunk(cache))
            full.reset()
            cache.crop(-3)
        assert cache.get_seq_length() == 150


def test_tokens_that_a_crop_may_take_do_not_shrink(model):
    """Assisted decoding: what others need comes after the crop."""
    pool = PagePool(LAYERS * 12, PAGE)
    with waiting(model, pool, **POLICIES["snapkv"]) as cache:
        cache.activate_past_recording()
        feed(model, cache, PROMPT)
        cache.crop(0)
        one_by_one(model, cache, MORE[:40])
        with PagedCache(model.config, "full", pool=pool) as full:
            with pytest.raises(PoolFull):
                feed(model, full, prompt(40))
            cache.crop(-3)
            feed(model, full, prompt(40))
        assert start_of(cache) == 157


def test_a_file_whose_model_has_not_come_keeps_what_it_has(model, tmp_path):
    """Its policy reads the model's RoPE."""
    options = {"policy": "expected_attention", "budget": 80, "n_future": 8}
    with waiting(model, PagePool(None, PAGE), **options) as cache:
        feed(model, cache, PROMPT)
        one_by_one(model, cache, MORE[:30])
        cache.save(tmp_path / "cache.safetensors")
    pool = PagePool(LAYERS * 12, PAGE)
    loaded = PagedCache.load(tmp_path / "cache.safetensors", model.config, pool=pool)
    with loaded, PagedCache(model.config, "full", pool=pool) as full:
        with pytest.raises(PoolFull):
            feed(model, full, prompt(40))
        one_by_one(model, loaded, [MORE[30]])
        feed(model, full, prompt(40))
        assert start_of(loaded) == 151


def test_rows_that_move(model):
    pool, rows = PagePool(LAYERS * 14, PAGE), [prompt(120), prompt(70, seed=1)]
    inputs = padded(rows)
    with waiting(model, pool, **POLICIES["snapkv"]) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 20, dtype=torch.int64)], 1)
        for at in range(20):
            feed(model, cache, [9], [11], mask=mask[:, : 121 + at])
        assert has_shrunk(cache) == [True, False]
        cache.reorder_cache(torch.tensor([1, 0]))
        assert has_shrunk(cache) == [False, True]
        cache.batch_select_indices(torch.tensor([True, False]))
        assert has_shrunk(cache) == [False]
        cache.reset()
        feed(model, cache, PROMPT)
        assert has_shrunk(cache) == [False]
        pool.check_integrity()


@pytest.mark.parametrize(
    ("options", "num_pages", "is_ample"),
    [
        ({"num_beams": 3}, 30, True),
        ({"prompt_lookup_num_tokens": 3}, 40, True),
        ({"prompt_lookup_num_tokens": 3}, 10, False),
    ],
)
def test_generate(options, num_pages, is_ample, model):
    """Ample: the tokens of full. Tight: to the end, in the pool."""
    settings = {"do_sample": False, "max_new_tokens": 2 * NEW, **options}
    ids = torch.tensor([[*PROMPT, *PROMPT[:20]]])
    pool = PagePool(LAYERS * num_pages, PAGE)
    with waiting(model, pool, policy="streaming", budget=64, recent_window=16) as cache:
        found = model.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(found, model.generate(ids, **settings)) or not is_ample
        assert (cache.stats().shrunk == 0) == is_ample
        pool.check_integrity()


def test_enable(model):
    with enable(model, policy="streaming", budget=96, start="pressure") as enabled:
        ids = torch.tensor([PROMPT])
        model.generate(ids, do_sample=False, max_new_tokens=NEW)
    assert (enabled.stats().evicted, enabled.stats().shrunk) == (0, 0)


def test_a_pool_keeps_no_cache_alive(model):
    pool = PagePool(LAYERS * 10, PAGE)
    cache = waiting(model, pool, **POLICIES["snapkv"])
    feed(model, cache, PROMPT)
    del cache
    gc.collect()
    assert pool.num_held == 0
    with PagedCache(model.config, "full", pool=pool) as full, pytest.raises(PoolFull) as found:
        feed(model, full, prompt(200))
    assert "start=pressure" not in str(found.value)
