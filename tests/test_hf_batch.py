"""generate_batch: the tokens of generate() for each prompt alone, in pages that stay bounded."""

from functools import cache

import pytest
import torch
from hf_models import FAMILIES, load, prompt
from hf_questions import OF_LLAMA

from paged_kv.hf import PagedCache, PagePool, PoolFull, generate_batch
from paged_kv.hf.batch import engine, generate
from paged_kv.hf.driver.loading import encode, load_model

LENGTHS = (5, 120, 33, 200, 1, 150)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
PAGE = {"page_size": 16}
QUIET = {"progress_bar": False}
POLICIES = {
    "streaming": {},
    "snapkv": {"observation_window": 16},
    "h2o": {},
    "pyramidal+calibrated_attention": {"statistics": OF_LLAMA, "fading": "on"},
    "pyramidal+snapkv": {"observation_window": 16},
    "value_merge": {"of": "h2o"},
}
NUM_LAYERS = 4
NEW = 56
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}
# Alone, the longest prompt needs 13 pages for itself and, a budget of 96 kept, later 7.
TIGHT = {"num_pages": 20 * NUM_LAYERS, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture
def seen(monkeypatch):
    """What happens inside: pools, most pages that were needed at once, requests that made way."""
    found = {"pools": [], "peak": 0, "preempted": 0, "together": 0}

    class Pool(PagePool):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found["pools"].append(self)

        def check(self, num_pages, why):
            super().check(num_pages, why)
            found["peak"] = max(found["peak"], self.num_held + num_pages)

    class Cache(engine.BatchCache):
        def free_blocks(self, request_id, no_cache=False):
            found["preempted"] += no_cache
            super().free_blocks(request_id, no_cache)

        def step(self, requests):
            found["together"] = max(found["together"], len(requests))
            return super().step(requests)

    monkeypatch.setattr(generate, "PagePool", Pool)
    monkeypatch.setattr(generate, "BatchCache", Cache)
    return found


def alone(model, tokens, cache=None, **settings):
    output = model.generate(
        torch.tensor([tokens], device=model.device), past_key_values=cache, **GREEDY | settings
    )
    return output[0, len(tokens) :].tolist()


@cache
def each_alone(name, policy):
    """generate() with a cache, prompt by prompt."""
    found, model = [], load(name)
    for tokens in PROMPTS:
        with PagedCache(model.config, **options_of(policy)) as cache:
            found.append(alone(model, tokens, cache))
    return found


def options_of(policy):
    return {"policy": policy, "budget": 96, **PAGE, **POLICIES[policy]}


def check_empty(seen):
    (pool,) = seen["pools"]
    pool.check_integrity()
    assert pool.num_held == 0
    assert seen["peak"] <= pool.num_pages


# ---- the same tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_full_is_generate(name, seen):
    model = load(name)
    expected = [alone(model, tokens) for tokens in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert generate_batch(model, PROMPTS, "full", **GREEDY, **QUIET) == expected
    check_empty(seen)
    assert seen["together"] == len(PROMPTS)


@pytest.mark.every_policy
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["room for all", "tight"])
def test_policies_are_generate_with_a_cache(model, policy, limits, seen):
    expected, options = each_alone("llama", policy), options_of(policy)
    assert generate_batch(model, PROMPTS, **options, **limits, **GREEDY, **QUIET) == expected
    check_empty(seen)
    assert (seen["preempted"] > 0) == bool(limits)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt2", "smollm3"])
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["room for all", "tight"])
def test_other_models_under_a_policy(name, limits, seen):
    model = load(name)
    expected, options = each_alone(name, "h2o"), options_of("h2o")
    assert generate_batch(model, PROMPTS, **options, **limits, **GREEDY, **QUIET) == expected
    check_empty(seen)


def test_tight_and_full(model, seen):
    expected = [alone(model, tokens) for tokens in PROMPTS]
    assert generate_batch(model, PROMPTS, **PAGE, **TIGHT, **GREEDY, **QUIET) == expected
    check_empty(seen)
    assert seen["preempted"]


@pytest.mark.every_policy
@pytest.mark.parametrize(
    ("page_format", "policy"), [("int4", "full"), ("int4", "snapkv"), ("int8", "streaming")]
)
def test_a_residual_shows_each_token_what_it_saw_before(model, policy, page_format, seen):
    """In whatever steps it is computed again: a step ends with its page."""
    options = {} if policy == "full" else options_of(policy)
    options |= PAGE | {"page_format": page_format, "residual_pages": 1}
    expected = generate_batch(model, PROMPTS, **options, **GREEDY, **QUIET)
    assert not seen["preempted"]
    assert generate_batch(model, PROMPTS, **options, **TIGHT, **GREEDY, **QUIET) == expected
    assert seen["preempted"]
    assert [generate_batch(model, [one], **options, **GREEDY, **QUIET) for one in PROMPTS] == [
        [one] for one in expected
    ]


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o"])
def test_compress_prefill_takes_prompts_through_a_small_pool(model, policy, seen):
    options = {**options_of(policy), "compress_prefill": True}
    with PagedCache(model.config, **options) as cache:
        expected = alone(model, PROMPTS[3], cache, prefill_chunk_size=32)
    # At most the budget, what does not fill a page, and a chunk.
    limits = {"num_pages": NUM_LAYERS * -(-(96 + 15 + 32) // 16), "max_batch_tokens": 32}
    settings = options | limits | GREEDY | QUIET
    assert generate_batch(model, [PROMPTS[3]], **settings) == [expected]
    check_empty(seen)
    with pytest.raises(PoolFull, match="too small: prompt 1"):
        generate_batch(model, [[3], PROMPTS[3]], **settings | {"compress_prefill": False})


def test_ends_and_order(model, seen):
    """A request ends at its end of sequence; others follow it."""
    whole = [alone(model, tokens) for tokens in PROMPTS]
    end = whole[3][20]
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]
    assert len(expected[3]) <= 21
    settings = GREEDY | {"eos_token_id": [end, 999]}
    found = generate_batch(model, PROMPTS, "full", max_requests=2, **settings, **QUIET)
    assert found == expected
    assert seen["together"] == 2


@pytest.mark.model
def test_a_real_model(smollm2_dir):
    model = load_model(smollm2_dir)
    text = encode(smollm2_dir, "The harbour was quiet at night, and nobody saw the ship. " * 20)
    options = {"policy": "pyramidal+snapkv", "budget": 128}
    prompts, expected = [text[:length] for length in (200, 7, 90)], []
    for tokens in prompts:
        with PagedCache(model.config, **options) as cache:
            expected.append(alone(model, tokens, cache, max_new_tokens=32))
    settings = GREEDY | {"max_new_tokens": 32}
    found = generate_batch(model, prompts, num_pages=30 * 15, **options, **settings, **QUIET)
    assert found == expected


# ---- nothing is lost


def test_an_error_in_the_middle(model, seen):
    options = {"policy": "snapkv", "budget": 96, **PAGE, **GREEDY, **QUIET}
    expected = generate_batch(model, PROMPTS, **options)
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 30:
            raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_hook(fail)
    seen["pools"].clear()
    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, PROMPTS, **options)
    hook.remove()
    check_empty(seen)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert generate_batch(model, PROMPTS, **options) == expected
