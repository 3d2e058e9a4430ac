"""Errors in the middle: what they leave is as it was, or the cache says that it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_errors import EARLY, PAGES, READ, TOKENS, begin, fails_once
from hf_models import load
from hf_pressure import feed, one_by_one, waiting

from paged_kv.hf import PagedCache, PagePool
from paged_kv.hf.arena import Arena

INTERRUPTED = r"interrupted the last forward pass.*reset\(\)"


@pytest.fixture(scope="module")
def model() -> Any:
    return load("llama")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("early", [True, False], ids=["at the end of a step", "before one"])
def test_a_policy_that_fails(error, early, model, monkeypatch):
    """Whatever it raises: some layers may have given up entries, and others not."""
    options = {**EARLY, "compress_prefill": early}
    with PagedCache(model.config, **options, **PAGES) as cache:
        expected = feed(model, cache, TOKENS[:READ]), one_by_one(model, cache, TOKENS[READ:])
        cache.reset()
        fails_once(monkeypatch, type(cache.sequences.policy), "compact", error("in a policy"))
        with pytest.raises(error, match="in a policy"):
            begin(model, cache)
        for use in (lambda: feed(model, cache, [5]), cache.stats, lambda: copy.deepcopy(cache)):
            with pytest.raises(ValueError, match=INTERRUPTED):
                use()
        cache.reset()
        found = feed(model, cache, TOKENS[:READ]), one_by_one(model, cache, TOKENS[READ:])
        assert all(map(torch.equal, found, expected))
        cache.pool.check_integrity()


def test_a_policy_that_fails_in_crop_or_for_another_cache(model, monkeypatch):
    with PagedCache(model.config, **EARLY, **PAGES) as cache:
        cache.activate_past_recording()
        feed(model, cache, TOKENS)
        fails_once(monkeypatch, type(cache.sequences.policy), "compact", RuntimeError("in crop"))
        with pytest.raises(RuntimeError, match="in crop"):
            cache.crop(-3)
        with pytest.raises(ValueError, match=INTERRUPTED):
            feed(model, cache, [5])
    pool = PagePool(num_pages=4 * 20, page_size=16)
    options = {"policy": "snapkv", "budget": 80}
    with waiting(model, pool, **options) as one, PagedCache(model.config, pool=pool) as other:
        feed(model, one, TOKENS[:READ], TOKENS[:READ])
        feed(model, one, [5], [6])
        kind = type(one.sequences.policy)
        fails_once(monkeypatch, kind, "compact", RuntimeError("of another"))
        with pytest.raises(RuntimeError, match="of another"):
            feed(model, other, TOKENS[:80])
        assert not one.sequences.shrinkable().any(), "the other row, which nobody can read any more"
        with pytest.raises(ValueError, match=INTERRUPTED):
            feed(model, one, [5])


@pytest.mark.parametrize("crops", [False, True], ids=["at the end of a step", "in crop"])
def test_an_error_behind_a_compaction(crops, model, monkeypatch):
    """The rows are as they should be, but nobody has counted the tokens."""
    with PagedCache(model.config, **EARLY, **PAGES) as cache:
        if crops:
            cache.activate_past_recording()
            feed(model, cache, TOKENS)
        fails_once(monkeypatch, type(cache.sequences.tables), "trim", MemoryError("no memory"))
        with pytest.raises(MemoryError):
            cache.crop(-3) if crops else feed(model, cache, TOKENS)
        with pytest.raises(ValueError, match=INTERRUPTED):
            feed(model, cache, [5])
        cache.reset()
        assert feed(model, cache, TOKENS).isfinite().all()


# ---- steps


def test_an_error_before_the_first_layer_attends(model, monkeypatch):
    """But for a ValueError, nobody knows what is left."""
    with PagedCache(model.config, **PAGES) as cache:
        feed(model, cache, TOKENS[:40])
        fails_once(monkeypatch, type(cache.sequences.marks), "note", MemoryError("no memory"))
        with pytest.raises(MemoryError):
            feed(model, cache, [5])
        with pytest.raises(ValueError, match=INTERRUPTED):
            feed(model, cache, [5])
        cache.reset()
        assert feed(model, cache, TOKENS[:40]).isfinite().all()


@pytest.mark.parametrize("skipped", [0, 2, 3])
def test_a_layer_that_is_left_out(skipped, model, monkeypatch):
    """As LayerDrop does, and as mllama's cross-attention layers are without an image."""
    ids = torch.tensor([TOKENS[:40]])
    layer = model.model.layers[skipped]
    with PagedCache(model.config, **PAGES) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", lambda hidden, **_: hidden)
            with pytest.raises(ValueError, match=rf"layers {skipped} of this model have computed"):
                model.generate(ids, past_key_values=cache, max_new_tokens=2)
        if skipped:
            with pytest.raises(ValueError, match=INTERRUPTED):
                feed(model, cache, [5])
        cache.reset()
        feed(model, cache, TOKENS[:40])


def test_a_layer_does_not_go_on_with_a_step_of_another_pass(model, monkeypatch):
    """The last layer was left out, so that nothing ended; then the first one, so nothing begins."""
    last, first = model.model.layers[3], model.model.layers[0]
    with PagedCache(model.config, **PAGES) as cache:
        for layer in (last, first):
            with monkeypatch.context() as patch:
                patch.setattr(layer, "forward", lambda hidden, **_: hidden)
                if layer is last:
                    feed(model, cache, [5])
                    continue
                with pytest.raises(ValueError, match=INTERRUPTED):
                    feed(model, cache, [6])


# ---- memory


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("is_shared", [False, True], ids=["laid out", "grown"])
def test_memory_that_does_not_grow(at, is_shared, model, monkeypatch):
    """What is held stays, tensor by tensor, whichever of keys, values and two beside them fails."""
    options = {"policy": "h2o", "budget": 96, "compress_prefill": True}
    pool = PagePool(page_size=16)
    with PagedCache(model.config, pool=pool, **options) as cache:
        feed(model, cache, TOKENS[:64])
        arena, tables = cache.sequences.tables.parts[0].arena, cache.sequences.tables
        assert len(arena.tensors) == 4
        tables.is_private = not is_shared
        pages = tables.ids[tables.ids >= 0]
        before = [tensor[:, pages].clone() for tensor in arena.tensors]
        capacity = arena.allocator.capacity
        ids, count, start = tables.ids.copy(), tables.count.copy(), tables._start.copy()
        with monkeypatch.context() as patch:
            fails_once(patch, Arena, "_zeros", MemoryError("no memory"), at)
            with pytest.raises(MemoryError):
                tables.extend(count * 0 + 20)
        assert arena.allocator.capacity == capacity
        assert {tensor.shape[1] for tensor in arena.tensors} == {capacity}
        assert all(map(torch.equal, before, (tensor[:, pages] for tensor in arena.tensors)))
        width = ids.shape[2]
        assert (tables.ids[..., :width] == ids).all()
        assert (tables.ids[..., width:] == -1).all()
        assert (tables.count == count).all()
        assert (tables._start == start).all()
        pool.check_integrity()
        feed(model, cache, TOKENS[64:])


def test_another_cache_of_the_pool_goes_on_when_memory_runs_out(model, monkeypatch):
    pool = PagePool(page_size=16)
    with PagedCache(model.config) as alone:
        feed(model, alone, TOKENS[:64])
        expected = one_by_one(model, alone, TOKENS[64:100])
    with PagedCache(model.config, pool=pool) as one, PagedCache(model.config, pool=pool) as other:
        feed(model, one, TOKENS[:64])
        with monkeypatch.context() as patch:
            fails_once(patch, Arena, "_zeros", MemoryError("no memory"), 1)
            with pytest.raises(MemoryError):
                feed(model, other, TOKENS)
        with pytest.raises(ValueError, match=INTERRUPTED):
            feed(model, other, TOKENS)
        found = one_by_one(model, one, TOKENS[64:100])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        other.reset()
        feed(model, other, TOKENS)
        pool.check_integrity()


@pytest.mark.parametrize("shared", [True, False], ids=["copy on write", "moves on"])
def test_a_copy_that_fails_takes_no_page(shared, model, monkeypatch):
    pool = PagePool(page_size=16)
    caches = [PagedCache(model.config, pool=pool)]
    feed(model, caches[0], TOKENS[:40])
    caches.append(copy.deepcopy(caches[0]) if shared else PagedCache(model.config, pool=pool))
    if not shared:
        feed(model, caches[1], TOKENS[:40])  # behind those of the first one
    with monkeypatch.context() as patch:
        fails_once(patch, Arena, "copy", MemoryError("no memory"))
        with pytest.raises(MemoryError):
            feed(model, caches[0], TOKENS)
    for cache in caches:
        cache.close()
    assert pool.num_held == 0
    pool.check_integrity()


# ---- reset


def test_reset_forgets_that_crop_was_waited_for():
    """An assistant's cache, used by itself from then on; its sliding windows likewise."""
    model = load("gemma3")
    options = {"policy": "streaming", "budget": 64, "page_size": 16, "compress_prefill": True}
    with PagedCache(model.config, **options) as cache:
        expected = feed(model, cache, TOKENS), one_by_one(model, cache, TOKENS[:30])
        entries = cache.stats().entries
        cache.reset()
        cache.activate_past_recording()
        feed(model, cache, TOKENS)
        assert cache.stats().evicted == 0
        cache.reset()
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        found = feed(model, cache, TOKENS), one_by_one(model, cache, TOKENS[:30])
        assert all(map(torch.equal, found, expected))
        assert cache.stats().entries == entries
