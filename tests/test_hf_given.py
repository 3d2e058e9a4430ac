"""A cache that generate() was given and the model does not use is noticed, whatever the reason."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, T5ForConditionalGeneration

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, compat, enable

SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
STREAMING = {"policy": "streaming", "budget": 64, "page_size": 16}
MESSAGE = "was given a PagedCache and did not use it"


class Drops(LlamaForCausalLM):
    """Puts its cache aside at some step, as Phi-3 does; or another one in its place."""

    at = 0
    replacement: Any = None

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        self.steps = 0 if kwargs.get("is_first_iteration") else self.steps + 1
        if self.steps == self.at:
            kwargs[compat.cache_argument()] = self.replacement and self.replacement()
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def drops(at: int, replacement: Any = None) -> Any:
    model = Drops(hf_models.load("llama").config).eval()
    model.steps, model.at, model.replacement = -1, at, replacement
    model.generation_config.eos_token_id = None
    return model


def inputs(rows: int = 1) -> torch.Tensor:
    return torch.tensor([hf_models.prompt(80, seed) for seed in range(rows)])


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("replacement", [None, DynamicCache])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_a_dropped_cache_is_an_error(at, replacement, options):
    model = drops(at, replacement)
    with PagedCache(model.config, **STREAMING) as cache:
        model(inputs(), past_key_values=cache)  # used once, which says nothing about generate()
        cache.reset()
        with pytest.raises(ValueError, match=MESSAGE):
            model.generate(inputs(), past_key_values=cache, **SETTINGS | options)
    with enable(model, **STREAMING), pytest.raises(ValueError, match=MESSAGE):
        model.generate(inputs(), **SETTINGS | options)
    model.generate(inputs(), **SETTINGS | options)  # no cache of ours, no matter


def test_prefill_in_chunks():
    model = drops(0)
    with PagedCache(model.config, **STREAMING) as cache, pytest.raises(ValueError, match=MESSAGE):
        model.generate(inputs(), past_key_values=cache, prefill_chunk_size=100, **SETTINGS)


def test_gradient_checkpointing():
    model = drops(-5)
    model.gradient_checkpointing_enable()
    model.train()
    with PagedCache(model.config, **STREAMING) as cache:
        if compat.cache_argument() == "past_key_values":  # from transformers 5.24 on it is kept
            with pytest.raises(ValueError, match=f"{MESSAGE}.*call model.eval"):
                model.generate(inputs(), past_key_values=cache, **SETTINGS)
            model.eval()
        model.generate(inputs(), past_key_values=cache, **SETTINGS)
        assert cache.stats().tokens == 91


class DropsT5(T5ForConditionalGeneration):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        del kwargs[compat.cache_argument()]
        return super().prepare_inputs_for_generation(*args, **kwargs)


def test_an_encoder_decoder():
    model = DropsT5(hf_models.load("t5").config).eval()
    cache = PagedEncoderDecoderCache(model, **STREAMING)
    with cache, pytest.raises(ValueError, match=MESSAGE):
        model.generate(inputs(), past_key_values=cache, **SETTINGS)


def test_what_uses_its_cache_is_left_alone():
    model = hf_models.load("llama")
    draft = hf_models.load("llama-draft")
    with PagedCache(model.config, **STREAMING) as cache:
        expected = model.generate(inputs(), past_key_values=cache, **SETTINGS)
        cache.reset()
        settings = {"prefill_chunk_size": 30, **SETTINGS}
        found = model.generate(inputs(), past_key_values=cache, **settings)
        assert torch.equal(found, expected)
        cache.reset()
        model.generate(inputs(), past_key_values=cache, assistant_model=draft, **SETTINGS)
        model.generate(inputs(3), **SETTINGS)  # while a cache of ours waits


def test_prefill_in_chunks_with_a_cache_that_holds_tokens():
    """Where transformers begins with the first token again, the document would be there twice."""
    model, ids = hf_models.load("llama"), inputs()
    settings = {"prefill_chunk_size": 20, **SETTINGS}
    with PagedCache(model.config, **STREAMING) as cache:
        expected = model.generate(ids, past_key_values=cache, **settings)
    with PagedCache(model.config, **STREAMING) as cache, torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        if compat.chunks_begin_anew():
            with pytest.raises(
                ValueError, match="prefill_chunk_size 20: the cache holds 40 tokens"
            ):
                model.generate(ids, past_key_values=cache, **settings)
            settings["prefill_chunk_size"] = None
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
        assert cache.stats().tokens == 91
