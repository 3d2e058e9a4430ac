"""Copies of a cache: each goes on as if it had seen all by itself; pages are shared meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from hf_models import load, padded, prompt
from hf_questions import OPTIONS, QUESTIONS, answers, ask, read

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, PoolFull


@pytest.mark.parametrize("is_shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("name", OPTIONS)
def test_answers_are_those_of_fresh_caches(name, is_shared):
    model, options = load("llama"), OPTIONS[name]
    expected = answers(model, options)
    pool = PagePool() if is_shared else None
    with PagedCache(model.config, pool=pool, **options) as cache:
        read(model, cache)
        before, held = cache.stats(), cache.pool.num_held
        copies = [copy.deepcopy(cache) for _ in QUESTIONS]
        assert cache.pool.num_held == held
        assert all(one.stats() == before and one.pool is cache.pool for one in copies)
        for one, question, answer in zip(copies, QUESTIONS, expected, strict=True):
            assert ask(model, one, question) == answer
        assert cache.stats() == before
        cache.pool.check_integrity()
        del copies[0], one
        gc.collect()
        assert ask(model, copy.deepcopy(copies[0]), [7, 8], 3)  # of a copy
        for one in copies:
            one.close()
        assert cache.pool.num_held == held
        assert ask(model, cache, QUESTIONS[0]) == expected[0]
    assert cache.pool.num_held == 0


@pytest.mark.parametrize("name", ["full", "late", "scores", "spill", "int4"])
def test_the_original_may_go_first(name):
    """Closed, or collected; and it may go on while a copy waits."""
    model, options = load("llama"), OPTIONS[name]
    expected = answers(model, options)
    cache = PagedCache(model.config, **options)
    read(model, cache)
    one, other = copy.deepcopy(cache), copy.deepcopy(cache)
    assert ask(model, cache, QUESTIONS[2]) == expected[2]
    cache.close()
    assert ask(model, one, QUESTIONS[1]) == expected[1]
    pool = one.pool
    del cache, one
    gc.collect()
    assert ask(model, other, QUESTIONS[0]) == expected[0]
    assert pool.num_held == other.stats().pages
    other.close()
    assert pool.num_held == pool.capacity_bytes == 0


def test_pages_in_use_grow_by_what_is_written():
    """203 tokens: 7 pages of 32 in each of 4 layers; the last of them has room."""
    model = load("llama")
    with PagedCache(model.config) as cache, torch.no_grad():
        read(model, cache)
        assert cache.pool.num_held == 4 * 7
        copies = [copy.deepcopy(cache) for _ in range(5)]
        assert cache.pool.num_held == 4 * 7
        for number, one in enumerate(copies, start=1):
            model(torch.tensor([[5]]), past_key_values=one)  # into the last page
            assert cache.pool.num_held == 4 * (7 + number)
        model(torch.tensor([prompt(40)]), past_key_values=copies[0])
        assert cache.pool.num_held == 4 * (7 + 5 + 1)
        assert cache.stats().pages == 4 * 7
        for one in copies:
            one.close()
        assert cache.pool.num_held == 4 * 7


def test_memory_is_laid_out_for_one_cache_again():
    """Where copies are gone, a compaction gives back what was theirs."""
    model, options = load("llama"), OPTIONS["positions"]
    with PagedCache(model.config, **options) as alone, torch.no_grad():
        read(model, alone)
        ask(model, alone, QUESTIONS[0])
        expected = alone.pool.capacity_bytes
    with PagedCache(model.config, **options) as cache, torch.no_grad():
        read(model, cache)
        copies = [copy.deepcopy(cache) for _ in range(4)]
        for one in copies:
            ask(model, one, QUESTIONS[0])
        assert cache.pool.capacity_bytes > 3 * expected
        for one in copies:
            one.close()
        ask(model, cache, QUESTIONS[0])
        assert cache.pool.capacity_bytes <= expected


def test_a_pool_with_a_limit():
    """A copy that would need more pages is refused; nothing is lost by it."""
    model = load("llama")
    pool = PagePool(num_pages=4 * 7 + 5)
    with PagedCache(model.config, pool=pool) as cache:
        read(model, cache)
        one, other = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = ask(model, one, [5], 10)
        with pytest.raises(PoolFull, match="needs 4 more pages, 1 are free"):
            ask(model, other, [5], 10)
        one.close()
        assert ask(model, other, [5], 10) == expected


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gpt2", "qwen3_next", "jamba"])
def test_models(name):
    """Sliding windows, linear attention: transformers' own layers are copied."""
    model = load(name)
    options: dict[str, Any] = {"policy": "snapkv", "budget": 96}
    expected = answers(model, options)
    with PagedCache(model.config, **options) as cache:
        read(model, cache)
        for question, answer in zip(QUESTIONS, expected, strict=True):
            assert ask(model, copy.deepcopy(cache), question) == answer
        assert ask(model, cache, QUESTIONS[1]) == expected[1]


@pytest.mark.parametrize("name", ["late", "scores", "spill", "int4"])
def test_rows(name):
    """Padded rows, reordered and repeated before and after."""
    model, options = load("llama"), OPTIONS[name]
    inputs = padded([prompt(160), prompt(90, seed=1), prompt(131, seed=2)])
    follow = torch.tensor([prompt(60, seed) for seed in range(3)])

    def run(cache: PagedCache, is_copied: bool) -> torch.Tensor:
        mask, found = inputs["attention_mask"], []
        model(**inputs, past_key_values=cache)
        for step in range(60):
            if step in (20, 40):
                cache.reorder_cache(torch.tensor([2, 0, 0]))
                mask = mask[[2, 0, 0]]
                cache = copy.deepcopy(cache) if is_copied else cache
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            new = follow[:, step : step + 1]
            output = model(new, attention_mask=mask, past_key_values=cache)
            found.append(output.logits[:, -1])
        return torch.stack(found)

    with torch.no_grad(), PagedCache(model.config, **options) as cache:
        expected = run(cache, is_copied=False)
    with torch.no_grad(), PagedCache(model.config, **options) as cache:
        torch.testing.assert_close(run(cache, is_copied=True), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders(name):
    model = load(name)
    inputs = {"input_ids": torch.tensor([prompt(50)])}
    start = {"decoder_input_ids": torch.tensor([prompt(100)])}
    follow = [torch.tensor([prompt(60, seed)]) for seed in range(2)]

    def run(cache: PagedEncoderDecoderCache, tokens: torch.Tensor) -> torch.Tensor:
        logits = []
        for step in range(60):
            new = tokens[:, step : step + 1]
            output = model(**inputs, decoder_input_ids=new, past_key_values=cache)
            logits.append(output.logits[0, -1])
        return torch.stack(logits)

    options: dict[str, Any] = {"policy": "snapkv", "budget": 64, "page_size": 16}
    expected = []
    with torch.no_grad():
        for tokens in follow:
            with PagedEncoderDecoderCache(model, **options) as cache:
                model(**inputs, **start, past_key_values=cache)
                expected.append(run(cache, tokens))
        with PagedEncoderDecoderCache(model, **options) as cache:
            model(**inputs, **start, past_key_values=cache)
            copies = [copy.deepcopy(cache) for _ in follow]
            held = cache.self_attention_cache.pool.num_held
            assert held == cache.stats().pages == 3 * 7
        for one, tokens, logits in zip(copies, follow, expected, strict=True):
            torch.testing.assert_close(run(one, tokens), logits, atol=1e-4, rtol=1e-4)
            one.close()
        with pytest.raises(ValueError, match="has been closed"):
            copy.deepcopy(cache)


def test_of_an_empty_cache():
    """The options, and memory of its own."""
    model = load("llama")
    cache = PagedCache(model.config, "streaming", 96, page_size=16)
    other = copy.deepcopy(cache)
    assert other.compression == cache.compression
    assert other.pool is not cache.pool
    assert other.pool.page_size == 16
    expected = ask(model, other, QUESTIONS[0])
    assert ask(model, cache, QUESTIONS[0]) == expected
    both = copy.deepcopy([cache, cache])
    assert both[0] is both[1]


def test_errors():
    model = load("llama")
    cache = PagedCache(model.config)
    for take in (pickle.dumps, copy.copy, lambda one: torch.save(one, "/dev/null")):
        with pytest.raises(ValueError, match=r"PagedCache cannot be pickled.*save\(path\)"):
            take(cache)
    read(model, cache)
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            ask(model, cache, QUESTIONS[0])
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="interrupted"):
        copy.deepcopy(cache)
    cache.close()
    with pytest.raises(ValueError, match="has been closed"):
        copy.deepcopy(cache)
