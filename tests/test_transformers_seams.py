"""What PagedCache relies on in transformers: fails, with the seam's name, when one moves."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import pytest
import tiny_models
import torch
from reference_loop import load_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    cache_utils,
    masking_utils,
    modeling_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from paged_kv.hf import PagedCache, compat, dispatch, masks
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
    "get_conv_state",  # from transformers 5.21 on
    "get_mask_sizes",
    "get_max_cache_shape",  # until 5.19
    "get_max_length",
    "get_recurrent_state",  # from 5.21 on
    "get_query_offset",
    "get_seq_length",
    "has_previous_state",
    "is_compileable",
    "is_croppable",
    "is_dummy",  # from 5.23 on
    "is_initialized",
    "is_linear",
    "is_recording_past",  # from 5.21 on
    "is_sliding",
    "max_batch_size",  # until 5.19
    "max_cache_len",  # until 5.19
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
    assert OWN <= public <= OWN | INHERITED
    for name in OWN:
        assert getattr(PagedCache, name) is not getattr(cache_utils.Cache, name)


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


@pytest.fixture
def seen(model, monkeypatch) -> list[dict[str, Any]]:
    """What our attention function is given."""
    found: list[dict[str, Any]] = []
    ours = dispatch.paged_attention

    def watching(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        found.append({"mask": mask, "scaling": kwargs["scaling"], "layer": key.layer})
        return ours(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(dispatch, "paged_attention", watching)
    return found


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_functions_are_looked_up_at_each_call(model, seen, name):
    """AttentionInterface.get_interface, AttentionMaskInterface[name]: update()'s answer and the
    length that get_mask_sizes gave come through, whatever the model's implementation is.
    """
    ids = torch.arange(3, 13)[None]
    model.set_attn_implementation(name)
    try:
        with PagedCache(model.config) as cache:
            model(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
    finally:
        model.set_attn_implementation("sdpa")
    assert [one["layer"] for one in seen] == list(range(6))
    assert {one["scaling"] for one in seen} == {32**-0.5}
    spec = seen[0]["mask"]
    assert all(one["mask"] is spec for one in seen)
    assert isinstance(spec, masks.MaskSpec)
    assert spec.make is AttentionMaskInterface._global_mapping[name]
    assert spec.arguments["mask_function"] is causal_mask_function
    expected = {"batch_size": 1, "q_length": 10, "kv_length": 10, "q_offset": 0, "kv_offset": 0}
    assert expected.items() <= spec.arguments.items()
    assert spec.padding.tolist() == [[True] * 10]


def test_mask_functions_of_transformers_are_called_with_names():
    """kv_length by name: this is what tells us that a mask is for a PagedCache."""
    names = {"q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
    for own in set(AttentionMaskInterface._global_mapping.values()):
        assert names <= set(inspect.signature(own).parameters)
    tree = ast.parse(inspect.getsource(masking_utils))
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "mask_interface"
    ]  # fmt: skip
    assert len(calls) >= 4, "masks are made in another way now"
    for call in calls:
        assert not call.args
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given["kv_length"] == "kv_length"


def test_lookups_of_transformers():
    """All models share two registries, of these classes, and ask for a name or with a default."""
    assert type(modeling_utils.ALL_ATTENTION_FUNCTIONS) is AttentionInterface
    assert type(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS) is AttentionMaskInterface
    dispatch.install()
    dispatch.install()
    assert AttentionInterface.get_interface.__wrapped__.__module__ == "transformers.modeling_utils"

    def own(*_: Any, **__: Any) -> None:
        """What a model computes when it is eager."""

    interface = AttentionInterface()
    for found in (
        interface.get_interface("eager", own),
        interface.get_interface("sdpa", own),
        interface["sdpa"],
    ):
        assert found.func is dispatch.attention
        assert found.args in ((own,), (sdpa_attention_forward,)), "in front once"
    with pytest.raises(KeyError, match="not a valid attention implementation"):
        interface.get_interface("nonsense", own)
    assert "nonsense" not in AttentionMaskInterface()
    assert AttentionMaskInterface()["sdpa"].args == (masking_utils.sdpa_mask,)


def test_importing_changes_nothing():
    code = """
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
import paged_kv.hf
from paged_kv.hf import PagedCache, enable, generate_batch
assert AttentionInterface.get_interface.__module__ == "transformers.modeling_utils"
assert "__getitem__" not in vars(AttentionInterface) | vars(AttentionMaskInterface)
assert not hasattr(GenerationMixin._prepare_cache_for_generation, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_says_how_many_tokens_it_takes_back():
    """Assisted decoding: activate_past_recording once, then crop with minus a number."""
    from transformers.generation import utils

    source = inspect.getsource(utils.GenerationMixin._assisted_decoding)
    assert "activate_past_recording()" in source
    assert f"outputs.{compat.cache_argument()}.crop(-" in source
