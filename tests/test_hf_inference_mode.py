"""Forward passes in different modes share a cache, or a pool: what is kept belongs to no mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_models import load, padded, prompt

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, generate_batch

MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
PAIRS = [
    ("inference", "no_grad"),
    ("no_grad", "inference"),
    ("inference", "grad"),
    ("grad", "inference"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "queries": {"policy": "pyramidal+snapkv", "budget": 96, "observation_window": 8},
    "scores": {"policy": "h2o", "budget": 96},
    "rotary": {"policy": "expected_attention", "budget": 96},
    "network": {"policy": "learned", "budget": 96},
    "merging": {"policy": "value_merge", "budget": 96},
    "spill": {"policy": "snapkv", "budget": 96, "spill": True, "spill_interval": 0},
    "int8": {"policy": "snapkv", "budget": 96, "page_format": "int8"},
    "fp8": {"policy": "lru", "budget": 96, "page_format": "fp8"},
    "residual": {"policy": "h2o", "budget": 96, "page_format": "int4", "residual_pages": 1},
}


def tensors_of(held: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """All tensors in these objects of ours, and in what they hold."""
    seen = set() if seen is None else seen
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for one in held.values():
            yield from tensors_of(one, seen)
    elif isinstance(held, (list, tuple, set)):
        for one in held:
            yield from tensors_of(one, seen)
    elif type(held).__module__.startswith("paged_kv"):
        yield from tensors_of(vars(held), seen)


def check_kept(cache: PagedCache) -> None:
    """Ordinary tensors, which remember no forward pass."""
    kept = list(tensors_of([cache.sequences, cache.pool]))
    policy, rotary = cache.sequences.policy, cache.sequences.rotary
    if policy is not None and "rotary" in policy.reads and rotary is not None:
        kept += tensors_of([rotary()])
    assert len(kept) > 1
    for tensor in kept:
        assert not tensor.is_inference()
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


def run(model: Any, cache: PagedCache, modes: tuple[str, str], first: int = 100) -> torch.Tensor:
    """Logits of two rows of tokens, in two modes that take turns: prompts, decoding, beams."""
    tokens = torch.tensor([prompt(first + 90, seed) for seed in range(2)])
    sizes, start, found = [first, *[1] * 35, 7, *[1] * 20], 0, []
    for size, mode in zip(sizes, itertools.cycle(modes)):
        with MODES[mode]():
            new = tokens[:, start : start + size]
            found.append(model(new, past_key_values=cache).logits.detach()[:, -1])
            if size == 7:
                cache.reorder_cache(torch.tensor([1, 1]))
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, 3]))
        start += size
    return torch.stack(found)


@pytest.mark.every_policy
@pytest.mark.parametrize("modes", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", OPTIONS)
def test_modes_take_turns(name, modes):
    model = load("llama")
    with PagedCache(model.config, **OPTIONS[name]) as cache:
        expected = run(model, cache, ("no_grad", "no_grad"))
    with PagedCache(model.config, **OPTIONS[name]) as cache:
        assert run(model, cache, modes).equal(expected)
        assert (cache.stats().compactions > 0) == (name != "full")
        check_kept(cache)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_pool_serves_caches_in_every_mode(name):
    """It was filled and emptied in another mode; with a limit its memory is taken once."""
    model = load("llama")
    expected = None
    pool = PagePool(num_pages=200)
    for mode in ("inference", "no_grad", "grad"):
        with PagedCache(model.config, pool=pool, **OPTIONS[name]) as cache:
            found = run(model, cache, (mode, mode))
            expected = found if expected is None else expected
            assert found.equal(expected)
            check_kept(cache)
        assert pool.num_held == 0


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_hybrids_with_softcaps_and_sinks(name):
    """Sinks are parameters, which ask for gradients."""
    model = load(name)
    options: dict[str, Any] = {"policy": "snapkv", "budget": 96}
    with PagedCache(model.config, **options) as cache:
        expected = run(model, cache, ("no_grad", "no_grad"))
    for modes in PAIRS:
        with PagedCache(model.config, **options) as cache:
            assert run(model, cache, modes).equal(expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders(name):
    """T5's position bias is learned: a cache that kept it would keep its graph.

    Cross-attention is transformers' own cache, which no gradient flows through after inference.
    """
    model = load(name)
    inputs = {"input_ids": torch.tensor([prompt(40)])}
    tokens = torch.tensor([prompt(130, seed=1)])
    found = []
    for modes in (("no_grad", "no_grad"), ("grad", "grad"), *PAIRS[:2]):
        with PagedEncoderDecoderCache(model, policy="h2o", budget=64, page_size=16) as cache:
            logits = []
            for step, mode in zip(range(130), itertools.cycle(modes)):
                with MODES[mode]():
                    new = tokens[:, step : step + 1]
                    output = model(**inputs, decoder_input_ids=new, past_key_values=cache)
                    logits.append(output.logits.detach())
            check_kept(cache.self_attention_cache)
            found.append(torch.cat(logits))
    for one in found:  # with gradients another kernel computes
        torch.testing.assert_close(one, found[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["queries", "spill", "residual"])
def test_batches(name):
    """The caller's mode decides how transformers' continuous batching runs."""
    model = load("llama")
    prompts = [prompt(60 + 25 * seed, seed) for seed in range(3)]
    found = []
    for mode in MODES.values():
        with mode():
            more: dict[str, Any] = {"max_new_tokens": 50, "progress_bar": False}
            found.append(generate_batch(model, prompts, **OPTIONS[name], **more))
    assert found[0] == found[1] == found[2]


def test_gradients_of_a_first_pass():
    """What the pass itself computes has them; what is kept of it has none."""
    model = load("llama")
    inputs = padded([prompt(40), prompt(27, seed=1)])
    real, mask = inputs["attention_mask"].bool(), {"attention_mask": inputs["attention_mask"]}
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, **mask).logits[real].sum().backward()
    expected, embedded.grad = embedded.grad, None
    with PagedCache(model.config, policy="snapkv", budget=96) as cache:
        model(inputs_embeds=embedded, past_key_values=cache, **mask).logits[real].sum().backward()
        assert expected is not None
        # Without padding another kernel computes.
        torch.testing.assert_close(embedded.grad, expected, atol=2e-3, rtol=1e-3)
        check_kept(cache)


@pytest.mark.parametrize("case", ["later", "one token", "scores", "softcap", "mask", "padded"])
def test_gradients_of_what_is_read_from_pages(case):
    """There are none of keys and values; those of the queries alone would be wrong ones."""
    model = load("gemma2" if case == "softcap" else "llama")
    ids = torch.tensor([prompt(40), prompt(40, seed=1)])
    policy = "h2o" if case == "scores" else "snapkv"
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[0, :7] = 0
    with PagedCache(model.config, policy=policy, budget=96) as cache:
        more: dict[str, Any] = {}
        if case in ("later", "padded"):
            more = {"attention_mask": mask[:, :40]} if case == "padded" else {}
            with torch.no_grad():
                model(ids, past_key_values=cache, **more)
            more = {"attention_mask": mask} if case == "padded" else {}
        if case == "mask":
            more["attention_mask"] = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
        new = ids if case in ("scores", "softcap", "mask") else ids[:, :1]
        logits = model(new, past_key_values=cache, **more).logits
        with pytest.raises(ValueError, match="read from pages have no gradients"):
            logits.sum().backward()
        check_kept(cache)
