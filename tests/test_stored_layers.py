"""Layers and attention backends whose pages we could not move: refused when a model is loaded."""

from __future__ import annotations

from typing import Any

import engines
import graph_steps
import pytest
import torch

from paged_kv.vllm.worker import stored_layers

NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


def layer(module: str = "triton_attn", **fields: Any) -> Any:
    """vLLM's attention layer, of which nothing is made that needs a GPU."""
    from vllm.model_executor.layers.attention import Attention

    made = Attention.__new__(Attention)
    torch.nn.Module.__init__(made)
    made.attn_backend = graph_steps.backend(module)
    made.impl = type("Impl", (), fields)()
    return made


def spec(module: str = "triton_attn", **changes: Any) -> Any:
    """As its backend publishes it."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    full = FullAttentionSpec(
        **{"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": torch.float16, **changes}
    )
    return customize_attention_spec(graph_steps.backend(module), full)


@pytest.mark.parametrize("module", graph_steps.BACKENDS)
def test_backends_that_interleave_tokens_are_refused(module):
    layers = {name: layer(module) for name in NAMES}
    specs = {name: spec(module) for name in NAMES}
    stored_layers.check_full(NAMES, layers, specs)
    stored_layers.check_others(layers, specs)
    if module != "rocm_attn":
        stored_layers.check_layouts("kv-policy", NAMES, layers, specs)
        return
    message = r"kv-policy: attention backend ROCM_ATTN .*layers\.0.*--attention-backend"
    with pytest.raises(ValueError, match=message):
        stored_layers.check_layouts("kv-policy", NAMES, layers, specs)


def test_other_layers_with_a_cache_are_refused():
    """An indexer's goes by the pages of the attention beside it."""
    layers = {NAMES[0]: layer(), "model.layers.0.indexer": torch.nn.Identity()}
    specs = dict.fromkeys(layers, spec())
    with pytest.raises(ValueError, match=r"layers\.0\.indexer \(Identity\) has a cache of its own"):
        stored_layers.check_others(layers, specs)
    layers["model.layers.0.indexer"].impl = None
    with pytest.raises(ValueError, match=r"layers\.0\.indexer has no plain full attention"):
        stored_layers.check_full(["model.layers.0.indexer"], layers, specs)


def test_alibi_is_refused():
    layers = {NAMES[0]: layer(alibi_slopes=[0.5])}
    with pytest.raises(ValueError, match=r"ALiBi position biases \(layer model\.layers\.0"):
        stored_layers.check_full(NAMES[:1], layers, {NAMES[0]: spec()})


def test_heads_that_differ_by_layer_and_scales_by_head():
    layers = {name: layer() for name in NAMES}
    specs = {NAMES[0]: spec(), NAMES[1]: spec(num_kv_heads=2)}
    with pytest.raises(ValueError, match=r"KV heads differ \(model\.layers\.0.*: \(4, 64, 64\), "):
        stored_layers.check_alike(NAMES, specs)
    stored_layers.check_alike(NAMES, dict.fromkeys(NAMES, spec()))
    for made in layers.values():
        made._q_scale = made._k_scale = made._v_scale = torch.ones(1)
    stored_layers.check_scales(NAMES, layers)
    layers[NAMES[1]]._k_scale = torch.ones(4)
    with pytest.raises(ValueError, match=r"that of layer model\.layers\.1.* has a scale for each"):
        stored_layers.check_scales(NAMES, layers)


@pytest.mark.vllm
@pytest.mark.usefixtures("in_process")
def test_a_model_of_which_no_layer_is_known(tiny, monkeypatch):
    """Its attention is of a class of its own: nothing would be compressed, without a word."""
    from paged_kv.vllm.worker.worker import PagedWorkerMixin

    monkeypatch.setattr(PagedWorkerMixin, "_by_layer", lambda *_: {})
    message = "kv-policy: this model has no attention layer that we"
    policy = {"policy": "streaming", "budget": 128}
    with pytest.raises(ValueError, match=message), engines.engine(tiny, policy):
        pass
