"""Mistakes with PagedCache are refused, say what to do, and leave everything consistent."""

from __future__ import annotations

import copy
from typing import Any

import hf_models
import pytest
import tiny_models
import torch
from accelerate.utils import send_to_device
from reference_loop import load_model

from paged_kv.hf import PagedCache, PagePool, PoolFull, generate_batch


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.tensor([hf_models.prompt(length, seed) for seed in range(rows)])


def generate(model: Any, ids: torch.Tensor, cache: Any, count: int = 40) -> Any:
    """Greedy; the new tokens of each row."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    found = model.generate(ids, past_key_values=cache, do_sample=False, **lengths)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "nonsense"}, "unknown kv-policy 'nonsense'; known are: full"),
        ({"policy": "snapkv", "windw": 3}, "unknown paged_kv option windw"),
        ({"policy": "snapkv", "budget": 40}, "budget 40 is too small: it must be at least"),
        ({"policy": "snapkv", "budget": 1.5}, "budget must be"),
        ({"page_format": "int3"}, "page_format must be one of native, int8, int4, fp8 or a .json"),
        (
            {"policy": "h2o", "spill": True, "spill_dir": "/nowhere"},
            "spill_dir must be a directory to write to, not '/nowhere': No such file",
        ),
        ({"page_size": 0}, "page_size must be an integer >= 1"),
        ({"page_size": 16, "pool": PagePool(5)}, "page_size 16 differs from the pool's, 32"),
    ],
)
def test_wrong_arguments(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        PagedCache(model.config, **arguments)


def test_a_pool_too_small_for_one_sequence(model):
    pool = PagePool(num_pages=5)
    with PagedCache(model.config, pool=pool) as cache:
        with pytest.raises(PoolFull, match=r"needs 6 more pages, 5 are free.*at least 6"):
            generate(model, tokens(1, 3), cache)
        assert pool.num_held == 0
    with pytest.raises(ValueError, match="num_pages must be an integer >= 1, not 0"):
        PagePool(num_pages=0)


def test_another_batch_size_or_model_or_nothing_at_all(model, tmp_path):
    cache = PagedCache(model.config, "streaming", 96)
    generate(model, tokens(2, 20), cache, 2)
    with pytest.raises(ValueError, match="holds 2 sequences, but the batch has 3"):
        generate(model, tokens(3, 40), cache, 2)
    other = load_model(tiny_models.saved("llama-one-kv-head", tmp_path))
    before = cache.stats()
    with pytest.raises(ValueError, match="holds entries of another model"):
        generate(other, tokens(2, 40), cache, 2)
    assert cache.stats() == before
    cache.close()
    cache.close()
    for use in (cache.stats, cache.reset, lambda: generate(model, tokens(1, 4), cache)):
        with pytest.raises(ValueError, match="closed: make a new one"):
            use()


def test_a_cache_with_fewer_layers_than_the_model(model):
    own = copy.deepcopy(model.config)
    own.num_hidden_layers, own.layer_types = 4, None
    with (
        PagedCache(own) as cache,
        pytest.raises(ValueError, match="made with another model's config"),
    ):
        generate(model, tokens(1, 20), cache, 2)


def test_a_batch_that_was_refused_leaves_nothing_behind(model):
    """Not even its size."""
    with PagedCache(model.config, pool=PagePool(num_pages=12)) as cache:
        with pytest.raises(PoolFull, match="needs 18 more pages"):
            generate(model, tokens(3, 20), cache, 2)
        found = generate(model, tokens(1, 20), cache, 2)
    with PagedCache(model.config) as cache:
        assert found.tolist() == generate(model, tokens(1, 20), cache, 2).tolist()


@pytest.mark.parametrize("name", ["gemma3", "jamba"])
def test_layers_of_other_kinds_notice_an_interruption(name):
    """They come before the paged ones, and have moved on when there are no pages."""
    model, ids = hf_models.load(name), tokens(1, 40)
    pool = PagePool(num_pages=4)
    with PagedCache(model.config) as cache:
        expected = generate(model, ids, cache, 4)
    other = PagedCache(model.config, pool=pool)
    model(ids[:, :33], past_key_values=other)
    with PagedCache(model.config, pool=pool) as cache:
        with pytest.raises(PoolFull):
            generate(model, ids, cache, 4)
        other.close()
        with pytest.raises(ValueError, match=r"interrupted.*reset\(\)"):
            generate(model, ids, cache, 4)
        cache.reset()
        assert generate(model, ids, cache, 4).tolist() == expected.tolist()


def test_a_policy_that_needs_rope_for_a_model_without():
    model = hf_models.load("gpt2")
    message = "needs the model's rotary position embeddings, and GPT2Attention has none"
    cache = PagedCache(model.config, "past_future", 100)
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 4), past_key_values=cache)
    cache.close()
    with pytest.raises(ValueError, match="no rotary position embedding"):
        generate_batch(model, [[5, 6]], "past_future", 100, progress_bar=False)


def test_weights_that_are_buffers(model):
    """GPTQ's and AWQ's layers have no parameters: the keys say where RoPE's tables are wanted."""
    other = copy.deepcopy(model)
    for module in other.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    found = []
    for one in (model, other):
        with PagedCache(one.config, "expected_attention", 100) as cache, torch.no_grad():
            logits = [one(tokens(1, 140), past_key_values=cache).logits]
            logits += [one(torch.tensor([[5]]), past_key_values=cache).logits for _ in range(9)]
            assert cache.stats().evicted > 0
            found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_model_on_several_devices(model):
    """accelerate moves what layers are given, the mask first."""
    layer = model.model.layers[1]

    def move(_: Any, args: Any, kwargs: Any) -> Any:
        return args, send_to_device(kwargs, "meta", skip_keys=["past_key_values"])

    handle = layer.register_forward_pre_hook(move, with_kwargs=True)
    try:
        with (
            PagedCache(model.config) as cache,
            pytest.raises(ValueError, match=r"^device_map: a PagedCache is on one device"),
        ):
            model(tokens(1, 4), past_key_values=cache)
    finally:
        handle.remove()
