"""What policies undo in vLLM is the very table of the layer, also past its end."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import tiny_models
import torch
from policy_loop import complete_and_check
from reference_loop import Rule, load_model

from paged_kv.kernels.rotary import Rotary

pytestmark = pytest.mark.vllm

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-scaled": {**YARN, "attention_factor": 1.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 256},
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 100.0},
    "ntk": {"rope_type": "ntk", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
HEAD = 32


class Layer(torch.nn.Module):
    """An attention layer of a model: vLLM's rotary embedding, under its usual name."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rotary_emb = rope


def rope_of(kind: dict[str, Any], dtype: torch.dtype = torch.float32, neox: bool = True) -> Any:
    """vLLM's own, of a model with 1,024 positions."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD, 1024, neox, {"rope_theta": 1e4, **kind}, dtype)


def find(*ropes: Any) -> Rotary:
    from paged_kv.vllm.worker.rope import find_rotary

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Layer(rope) for rope in ropes)
    return find_rotary(model, [f"layers.{index}.attn" for index in range(len(ropes))])


def check_rotation(rope: Any, rotary: Rotary, length: int, tolerance: float) -> None:
    """Queries turned by the layer, and by the policies' RoPE; and turned back."""
    from vllm.config import VllmConfig, set_current_vllm_config

    torch.manual_seed(0)
    positions = torch.arange(length)
    queries = torch.randn(length, HEAD)
    with set_current_vllm_config(VllmConfig()):
        forward = getattr(rope, "forward_native", rope.forward)
        turned, _ = forward(positions, queries.clone(), queries.clone())
    torch.testing.assert_close(rotary.rotate(queries, positions), turned, atol=tolerance, rtol=0)
    back = rotary.rotate(turned, positions, back=True)
    torch.testing.assert_close(back, queries, atol=tolerance, rtol=0)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_the_layers_own(name, neox):
    check_rotation(rope := rope_of(KINDS[name], neox=neox), find(rope, rope), 1000, 1e-3)


@pytest.mark.parametrize("name", ["default", "yarn", "llama3", "linear"])
def test_past_the_table_it_goes_on(name):
    """The next 512 positions of a sequence of max_model_len; a longer table has them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    rotary, kind = find(rope_of(KINDS[name])), {"rope_theta": 1e4, **KINDS[name]}
    if name == "yarn":  # has the length of its factor; the frequencies do not depend on that
        positions = torch.arange(1500)
        angles = positions[:, None] * rotary.frequencies.double()
        cos, sin = rotary.scale * angles.cos(), rotary.scale * angles.sin()
    else:
        with set_current_vllm_config(VllmConfig()):
            longer = get_rope(HEAD, 4096, True, kind, torch.float32)
        cos, sin = longer.cos_sin_cache.double().chunk(2, -1)
    for ours, theirs in zip(rotary.mean(torch.tensor([900]), 512), (cos, sin), strict=True):
        expected = theirs[900:1412].mean(0, keepdim=True)
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)


def test_a_rounded_table_has_the_same_frequencies():
    exact, rounded = (find(rope_of(YARN, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.frequencies, rounded.frequencies)
    assert exact.scale == rounded.scale != 1


def test_refusals():
    default = {"rope_type": "default"}
    with pytest.raises(ValueError, match="have different ones"):
        find(rope_of(default), rope_of(YARN))
    with pytest.raises(ValueError, match=r"layer layers\.1\.attn has no plain rotary embedding"):
        find(rope_of(default), None)
    with pytest.raises(ValueError, match=r"no plain rotary embedding \(MRotaryEmbedding\)"):
        find(rope_of({**default, "mrope_section": [4, 6, 6]}))
    changed = rope_of({**default, "rope_theta": 5e3})
    changed.cos_sin_cache = changed.cos_sin_cache.flip(0)
    with pytest.raises(ValueError, match=r"layers\.0\.attn has a table of its own"):
        find(changed)


PAST_FUTURE = {"policy": "past_future", "budget": 96, "n_future": 100, "observation_window": 16}


def test_the_next_positions_reach_past_max_model_len(tmp_path):
    """Token for token the plain loop's, to the last token that the model may have."""
    tiny = tiny_models.saved("llama-yarn", tmp_path)
    prompts = [[5 + (7 * i + i * i) % 100 for i in range(length)] for length in (150, 206)]
    with engines.engine(tiny, PAST_FUTURE, max_model_len=256, skip_tokenizer_init=True) as llm:
        args = prompts, Rule([96] * 6), PAST_FUTURE, 50
        _, loops = complete_and_check(llm, load_model(tiny), *args)
    assert sum(loop.num_drops for loop in loops) > 50


@pytest.mark.parametrize("max_model_len", [128, 512])
def test_longrope_as_max_model_len_says(tmp_path, max_model_len):
    """vLLM takes one kind of factors for all: short ones if no sequence can pass the switch."""
    tiny = tiny_models.saved("phi3-longrope", tmp_path)
    settings = {"max_model_len": max_model_len, "skip_tokenizer_init": True}
    with engines.engine(tiny, PAST_FUTURE, **settings) as llm:
        runner = engines.worker(llm).model_runner
        rope = runner.get_model().model.layers[0].self_attn.rotary_emb
        assert rope.use_long_rope == (max_model_len == 512)
        rotary = engines.worker(llm).compactor.observer.facts.rotary
        check_rotation(rope, rotary, max_model_len, 1e-3)
        (output,) = engines.complete(llm, [[5] * 100], 28)
        assert len(output.token_ids) == 28
