"""PagedCache: what it holds is what its budget says, nothing is lost, mistakes are refused."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import tiny_models
import torch
from policy_cases import OF_LLAMA
from reference_loop import load_model
from transformers import LogitsProcessor

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.hf import PagedCache, PagePool, PoolFull

NAMES = [*(name for name in registry.available() if name != "full"), "pyramidal+snapkv"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


def tokens(*shape: int) -> torch.Tensor:
    rng = random.Random(sum(shape))
    count = torch.Size(shape).numel()
    return torch.tensor([rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(count)]).view(
        shape
    )


def generate(model: Any, ids: torch.Tensor, cache: Any, count: int = 40, **more: Any) -> Any:
    """Greedy; the new tokens of each row."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    found = model.generate(ids, past_key_values=cache, do_sample=False, **lengths, **more)
    return found[:, ids.shape[1] :]


class Dictated(LogitsProcessor):
    """The next tokens are given: each row's differ, so that no two entries are alike and tie."""

    def __init__(self, rows: torch.Tensor, start: int) -> None:
        self.rows, self.start = rows, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.rows[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def logits(model: Any, ids: torch.Tensor, follow: torch.Tensor, cache: Any, **more: Any) -> Any:
    """[rows, steps, vocabulary] of generate(), which continues with `follow` [rows, steps]."""
    more |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    more["logits_processor"] = [Dictated(follow, ids.shape[1])]
    count = follow.shape[1]
    output = model.generate(
        ids, past_key_values=cache, max_new_tokens=count, do_sample=False, **more
    )
    assert output.sequences[:, ids.shape[1] :].equal(follow)
    return torch.stack(output.logits, 1)


@pytest.mark.every_policy
@pytest.mark.parametrize("policy", NAMES)
def test_a_left_padded_row_is_its_solo_run(policy, model):
    """Rows of 170, 130, 37 and 1 tokens; one begins to drop at once, one later, two never."""
    lengths, budget, end = [170, 130, 37, 1], 160 if "pyramidal" in policy else 100, 170
    orders = [torch.randperm(210, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    rows = torch.stack(orders) + 3
    mask = torch.stack([torch.arange(end) >= end - length for length in lengths]).long()
    # Statistics of queries that are gathered would be those of all rows, or of one.
    chosen = policy in ("pyramidal", "calibrated_attention")
    options = {"statistics": OF_LLAMA} if chosen else {}
    with PagedCache(model.config, policy, budget, **options) as cache:
        found = logits(model, rows[:, :end], rows[:, end:], cache, attention_mask=mask)
        assert cache.stats().compactions > 0
    for row, length in enumerate(lengths):
        one = rows[row : row + 1]
        with PagedCache(model.config, policy, budget, **options) as cache:
            solo = logits(model, one[:, end - length : end], one[:, end:], cache)
        torch.testing.assert_close(found[row], solo[0], atol=3e-4, rtol=0)


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o", "value_merge"])
def test_held_entries_stay_within_a_page_of_the_budget(policy, model):
    """After a short prompt, at each step; memory is that of the pages and a few more."""
    with PagedCache(model.config, policy, 128) as cache, torch.inference_mode():
        ids = tokens(2, 400)
        model(ids[:, :20], past_key_values=cache)
        for step in range(20, 400):
            model(ids[:, step : step + 1], past_key_values=cache)
            stats, count = cache.stats(), 6 * 2
            assert stats.entries == count * min(step + 1, 128 + (step + 1 - 128) % 32)
            assert stats.pages <= count * (128 // 32 + 1)
            assert stats.bytes == stats.pages * 2 * 32 * 2 * 32 * 4
        assert stats.peak_bytes == count * 5 * 2 * 32 * 2 * 32 * 4
        side = 1 + stats.side_bytes / stats.bytes
        assert cache.pool.capacity_bytes <= stats.peak_bytes * side * 1.4


@pytest.mark.parametrize("compress_prefill", [True, False])
def test_memory_during_a_long_prompt(compress_prefill, model):
    """In chunks of 512: a chunk more than the budget, or all of the prompt until its end."""
    ids, page_bytes = tokens(1, 2000), 2 * 32 * 2 * 32 * 4
    options = {"compress_prefill": compress_prefill}
    with PagedCache(model.config, "snapkv", 256, **options) as cache:
        generate(model, ids, cache, 3, prefill_chunk_size=512)
        stats, entries = cache.stats(), 512 + 256 + 32 if compress_prefill else 2000
        peak = stats.peak_bytes / page_bytes / 6 * 32
        assert entries - 32 <= peak <= entries + 32
        assert stats.entries <= 6 * (256 + 32)
        # What the prompt took is given back, not only marked as free.
        assert cache.pool.capacity_bytes <= 6 * (256 + 4 * 32) * (2 * 2 * 32 * 4 + 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "budget"),
    [(2048, 512), pytest.param(8192, 2048, marks=pytest.mark.exhaustive)],
)
def test_memory_of_many_tokens(model, num_tokens, budget):
    """Within one page per layer of the budget at each step, within a chunk more in the prompt."""
    page = 2 * 2 * 32 * 32 * 4 * 6  # bytes of a page in all layers
    ids, kept = tokens(1, num_tokens), budget // 32
    options: dict[str, Any] = {"policy": "streaming", "budget": budget}
    with torch.inference_mode():
        with PagedCache(model.config, **options) as cache:
            model(ids[:, :20], past_key_values=cache)
            for step in range(20, num_tokens):
                model(ids[:, step : step + 1], past_key_values=cache)
                assert cache.stats().bytes <= min(kept + 1, step // 32 + 1) * page
            assert kept * page <= cache.stats().bytes
            assert cache.stats().peak_bytes <= (kept + 1) * page
        with PagedCache(model.config, **options, compress_prefill=True) as cache:
            generate(model, ids, cache, 2, prefill_chunk_size=512)
            assert cache.stats().bytes <= (kept + 1) * page
            assert (kept + 16) * page <= cache.stats().peak_bytes <= (kept + 1 + 16) * page
        with PagedCache(model.config, **options) as cache:
            generate(model, ids, cache, 2, prefill_chunk_size=512)
            assert cache.stats().bytes <= (kept + 1) * page
            assert cache.stats().peak_bytes == num_tokens // 32 * page


@pytest.mark.slow
def test_nothing_is_lost(model):
    """40 calls on one pool: some end, some fail in the middle, some are abandoned."""
    pool = PagePool(num_pages=400)
    for index in range(40):
        policy = ["full", "streaming", "snapkv", "h2o"][index % 4]
        cache = PagedCache(model.config, policy, None if policy == "full" else 96, pool=pool)
        rows = 1 + index % 3
        if index % 5 == 1:
            with pytest.raises(RuntimeError, match="in the middle"), failing(model, index % 5):
                generate(model, tokens(rows, 110), cache, 5)
            with pytest.raises(ValueError, match=r"interrupted.*reset\(\)"):
                generate(model, tokens(rows, 110), cache, 5)
            cache.reset()
            assert pool.num_held == 0
        generate(model, tokens(rows, 100 + index % 40), cache, 5, num_beams=rows)
        assert pool.num_held == cache.stats().pages > 0
        if index % 2:
            cache.close()
        del cache
        gc.collect()
        pool.check_integrity()
        assert pool.num_held == 0
    assert model.config._attn_implementation == "sdpa"


class failing:
    """A layer of the model raises."""

    def __init__(self, model: Any, layer: int) -> None:
        self.module = model.model.layers[layer].mlp

    def __enter__(self) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        self.hook = self.module.register_forward_pre_hook(fail)

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


def test_abandoned_generators_give_their_pages_back(model):
    pool = PagePool(num_pages=100)

    def stream():
        cache = PagedCache(model.config, pool=pool)
        for step in range(100):
            yield model(tokens(1, 5), past_key_values=cache).logits
            assert step < 3

    steps = stream()
    next(steps), next(steps)
    assert pool.num_held == 6
    del steps
    gc.collect()
    assert pool.num_held == 0
    assert model.config._attn_implementation == "sdpa"


def test_a_pool_shared_by_caches_is_never_exceeded(model):
    pool = PagePool(num_pages=60)
    first = PagedCache(model.config, "streaming", 96, pool=pool)
    generate(model, tokens(1, 200), first, 10)
    assert first.stats().pages == pool.num_held == 24
    second = PagedCache(model.config, pool=pool)
    with pytest.raises(PoolFull, match=r"num_pages 60 is too small.*needs 42 more.*36 are free"):
        generate(model, tokens(1, 200), second, 10)
    assert pool.num_held == 24
    expected = generate(model, tokens(1, 150), PagedCache(model.config), 10)
    assert generate(model, tokens(1, 150), second, 10).tolist() == expected.tolist()
    again = generate(model, tokens(1, 40), PagedCache(model.config), 10)
    first.close()
    second.reset()
    assert generate(model, tokens(1, 40), second, 10).tolist() == again.tolist()


@pytest.mark.parametrize("policy", ["full", "snapkv", "h2o", "value_merge"])
def test_scattered_pages_change_nothing(policy, model):
    """A crowded pool has no runs of neighbours: entries are gathered."""
    budget = None if policy == "full" else 96
    ids = tokens(2, 130)
    with PagedCache(model.config, policy, budget) as cache:
        expected = generate(model, ids, cache)
        assert (cache.sequences.tables.first >= 0).all()
    pool = PagePool(num_pages=150)
    holes = PagedCache(model.config, pool=pool)
    holes_ids = [tokens(1, 32) for _ in range(20)]
    caches = []
    for one in holes_ids:  # every second page of a part of the pool
        caches.append(PagedCache(model.config, pool=pool))
        model(one, past_key_values=caches[-1])
    for cache in caches[::2]:
        cache.close()
    with PagedCache(model.config, policy, budget, pool=pool) as cache:
        assert generate(model, ids, cache).tolist() == expected.tolist()
        assert (cache.sequences.tables.first < 0).any()
    holes.close()


def test_beams_share_pages(model):
    with PagedCache(model.config) as cache:
        generate(model, tokens(1, 160), cache, 40, num_beams=4)
        stats = cache.stats()
        assert stats.sequences == 4
        assert stats.pages < 4 * 6 * 7  # 199 tokens
        cache.pool.check_integrity()


def test_positions_and_lengths_are_those_of_the_whole_text(model):
    with PagedCache(model.config, "streaming", 96) as cache:
        generate(model, tokens(1, 150), cache, 20)
        assert cache.get_seq_length() == 169
        assert cache.stats().tokens == 169
        assert cache.stats().entries < 6 * 128


def test_config_objects_and_stats(model):
    config = CompressionConfig.from_dict({"policy": "snapkv", "budget": 96})
    with PagedCache(model.config, config) as cache:
        generate(model, tokens(1, 150), cache, 10)
        stats = cache.stats()
    assert stats.bytes_by_tier == {"device": stats.bytes, "host": 0, "mmap": 0}
    assert stats.evicted == 6 * (159 - stats.entries // 6)
    with pytest.raises(ValueError, match="budget must be in it"):
        PagedCache(model.config, config, budget=100)


def test_an_option_s_old_name(model):
    options = {"policy": "pyramidal+streaming", "budget": 150}
    with pytest.warns(DeprecationWarning, match="tiers is now called pyramid_steps") as told:
        cache = PagedCache(model.config, **options, tiers=2)
    assert [warning.filename for warning in told] == [__file__]
    assert cache.compression == CompressionConfig.from_dict({**options, "pyramid_steps": 2})
