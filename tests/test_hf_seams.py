"""What PagedCache relies on in transformers: fails, with the seam's name, when one moves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny_models
import torch
from reference_loop import load_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, cache_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from paged_kv.hf import PagedCache, masks
from paged_kv.hf.paged_layer import PagedLayer

# Methods of transformers' Cache: those that PagedCache answers itself, and those that only ask its
# layers what PagedLayer knows, or are for other layers, devices or compilers.
OWN = {
    "activate_past_recording",
    "batch_repeat_interleave",
    "batch_select_indices",
    "crop",
    "reorder_cache",
    "reset",
    "update",
}
INHERITED = {
    "batch_size",
    "early_initialization",
    "get_mask_sizes",
    "get_max_cache_shape",
    "get_max_length",
    "get_query_offset",
    "get_seq_length",
    "has_previous_state",
    "is_compileable",
    "is_croppable",
    "is_initialized",
    "is_linear",
    "is_sliding",
    "max_batch_size",
    "max_cache_len",
    "offload",
    "prefetch",
    "update_conv_state",
    "update_indexer",
    "update_recurrent_state",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


def test_every_method_of_a_cache_is_known():
    public = {name for name in vars(cache_utils.Cache) if not name.startswith("_")}
    assert public == OWN | INHERITED
    assert set(vars(PagedCache)) >= OWN


def test_every_method_of_a_layer_is_answered():
    """Of those that a Cache passes on to layers, ours has what PagedCache does not answer."""
    abstract = cache_utils.CacheLayerMixin.__abstractmethods__
    assert abstract == {
        "get_mask_sizes",
        "get_max_length",
        "get_seq_length",
        "lazy_initialization",
        "update",
    }
    assert abstract <= set(vars(PagedLayer))


def test_layers_by_type(model):
    """cache_utils.get_layer_types_and_kwargs, DYNAMIC_LAYER_TYPE_MAPPING."""
    types, arguments = cache_utils.get_layer_types_and_kwargs(model.config)
    assert types == ["full_attention"] * 6
    assert list(arguments) == [{}] * 6
    known = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    assert known["full_attention"] is cache_utils.DynamicLayer
    assert known["sliding_attention"] is cache_utils.DynamicSlidingWindowLayer


def test_the_attention_function_is_looked_up_at_each_call(model):
    """AttentionInterface: by the name in the config, with update()'s answer and the lazy mask."""
    seen: list[dict[str, Any]] = []

    def watching(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append({"mask": mask, "scaling": kwargs["scaling"], "layer": key.layer})
        return masked(module, query, key, value, mask, **kwargs)

    from paged_kv.hf.attention_function import paged_attention as masked

    with PagedCache(model.config) as cache:
        AttentionInterface.register(masks.NAME, watching)
        try:
            ids = torch.arange(3, 13)[None]
            model(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
        finally:
            AttentionInterface.register(masks.NAME, masked)
    assert [one["layer"] for one in seen] == list(range(6))
    assert {one["scaling"] for one in seen} == {32**-0.5}
    spec = seen[0]["mask"]
    assert all(one["mask"] is spec for one in seen)
    assert isinstance(spec, masks.MaskSpec)
    assert spec.arguments["mask_function"] is causal_mask_function
    expected = {"batch_size": 1, "q_length": 10, "kv_length": 10, "q_offset": 0, "kv_offset": 0}
    assert expected.items() <= spec.arguments.items()
    assert spec.padding.tolist() == [[True] * 10]


def test_the_mask_function_is_registered():
    """AttentionMaskInterface: without one, padding would be lost."""
    assert masks.NAME in AttentionMaskInterface._global_mapping
    known = inspect.signature(sdpa_mask).parameters
    names = {"q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
    assert names <= set(known)


def test_the_config_names_the_implementation(model):
    """The model reads config._attn_implementation in each layer, each time."""
    assert model.model.layers[3].self_attn.config is model.config
    cache = PagedCache(model.config)
    second = PagedCache(model.config)
    assert model.config._attn_implementation == masks.NAME
    cache.close()
    assert model.config._attn_implementation == masks.NAME
    second.close()
    assert model.config._attn_implementation == "sdpa"


def test_models_without_our_cache_get_what_sdpa_gives(model):
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        decoded = DynamicCache(config=model.config)
        model(ids, attention_mask=mask, past_key_values=decoded)
        with PagedCache(model.config):
            found = model(ids, attention_mask=mask, use_cache=False).logits
            other = DynamicCache(config=model.config)
            model(ids, attention_mask=mask, past_key_values=other)
    assert torch.equal(found, expected)
    assert torch.equal(other.layers[5].keys, decoded.layers[5].keys)


def test_generate_says_how_many_tokens_it_takes_back():
    """Assisted decoding: activate_past_recording once, then crop with minus a number."""
    from transformers.generation import utils

    source = inspect.getsource(utils.GenerationMixin._assisted_decoding)
    assert "activate_past_recording()" in source
    assert "past_key_values.crop(" in source
