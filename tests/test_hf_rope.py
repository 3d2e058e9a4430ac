"""What policies undo is what the model applied, at every position; or they say that they cannot."""

from __future__ import annotations

import copy
import sys
from typing import Any

import hf_models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, enable, generate_batch, seams
from paged_kv.hf.rope import of_embedding

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 16.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
FIXED = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn-scaled": {**YARN, "attention_factor": 1.7, "beta_fast": 16, "truncate": False},
    "llama3": LLAMA3,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
PAST_FUTURE = {"policy": "past_future", "budget": 64, "page_size": 16, "observation_window": 8}


def make(rope: dict[str, Any], kind: str = "llama", **more: Any) -> Any:
    """A tiny model of 128 positions."""
    sizes = hf_models._SIZES if kind == "llama" else hf_models._NO_HEAD_DIM
    values = {**sizes, "max_position_embeddings": 128, **more}
    config = AutoConfig.for_model(kind, **values, rope_parameters={"rope_theta": 1e4, **rope})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def phi3(rope: dict[str, Any] | None = None) -> Any:
    values = {"sliding_window": None, "original_max_position_embeddings": 64}
    return make(rope or LONGROPE, "phi3", **values)


def applied(model: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward pass over these positions turns by: [n, rotary_dim / 2] each."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    return cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]


def rotary_of_layer(model: Any) -> Any:
    return seams.rotary_of_layer(attention(model), model.device)


def ids(length: int) -> torch.Tensor:
    return torch.tensor([hf_models.prompt(length)])


def generate(model: Any, length: int, cache: Any, count: int = 20, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **more}
    return model.generate(ids(length), past_key_values=cache, **settings)[0, length:]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("whose", [seams.rotary_of, rotary_of_layer])
def test_tables_are_the_models_own_at_all_positions(name, whose):
    model = make(FIXED[name])
    positions = torch.arange(3000)  # far past max_position_embeddings
    cos, sin = applied(model, positions)
    rotary = whose(model)()
    for ours, theirs in zip(rotary.at(positions), (cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    start = torch.tensor([0, 100, 2000])  # the mean of the next 512 reaches past the end, too
    for ours, theirs in zip(rotary.mean(start, 512), (cos, sin), strict=True):
        expected = torch.stack([theirs[at : at + 512].double().mean(0) for at in start.tolist()])
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "phi", "cohere", "glm", "glm4", "ernie4_5", "helium"])
def test_whatever_turns_together_is_what_the_model_turns(kind):
    """Halves or neighbours, all dimensions or some: by the function that its layers call."""
    sizes = {**hf_models._SIZES, "num_hidden_layers": 1, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    positions = torch.arange(40)
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    modeling = sys.modules[type(model).__module__]
    keys = torch.randn(1, 1, 40, attention(model).head_dim)
    size = cos.shape[-1] if kind == "phi" else keys.shape[-1]  # it turns a part, by itself
    _, turned = modeling.apply_rotary_pos_emb(*[keys[..., :size]] * 2, cos, sin)
    for whose in (seams.rotary_of(model), rotary_of_layer(model)):
        undone = whose().rotate(turned[0, 0], positions, back=True)
        torch.testing.assert_close(undone, keys[0, 0, :, :size], atol=1e-4, rtol=0)


REFUSED = {
    "has none": ("granitemoehybrid", {"position_embedding_type": None}),
    "has layers without": ("granite_swa", {"layer_rope_theta": [1e4, 0.0]}),
    "has several kinds": ("granite_swa", {"layer_rope_theta": [1e4, 1e6]}),
    "has a norm after it": ("hunyuan_v1_dense", {}),
    "has positions of several dimensions": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6]}},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_turn_back_does_not_undo_is_refused(what):
    kind, more = REFUSED[what]
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **more)
    rope = of_embedding(lambda: pytest.fail("made"), config, torch.device("cpu"))
    message = rf"a {kind} model {what}: use a policy that reads no RoPE"
    with pytest.raises(ValueError, match=message):
        rope("kv-policy 'pyramidal'")


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize(("prompt", "count"), [(40, 20), (65, 60), (100, 60)])
def test_longrope_is_undone_by_the_factors_of_the_forward_passes(kind, prompt, count):
    model = phi3() if kind == "phi3" else make(LONGROPE)
    policy = {**PAST_FUTURE, "recent_window": 8, "observation_window": 4, "budget": 32}
    with PagedCache(model.config, **policy) as cache:
        generate(model, prompt, cache, count)
        positions = torch.arange(prompt + count - 1)
        rotary = cache.sequences.rotary()
        for ours, theirs in zip(rotary.at(positions), applied(model, positions), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert cache.stats().evicted > 0
        cache.reset()  # the next batch may be on the other side
        generate(model, 140 - prompt, cache, 4)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_no_one_table_is_refused_by_name(rope):
    model = make(rope)
    length = 120 if rope is DYNAMIC else 60
    message = f"kv-policy 'past_future' undoes the model's RoPE.*rope_type '{rope['rope_type']}'"
    with PagedCache(model.config, **PAST_FUTURE) as cache:
        with pytest.raises(ValueError, match=message):
            generate(model, length, cache)
        cache.reset()
        generate(model, 50, cache, 10)  # within the first tables
    with pytest.raises(ValueError, match=message):
        generate_batch(model, [[5] * length], "past_future", 64, page_size=16, max_new_tokens=20)
    assert (
        len(generate_batch(model, [[5] * 40], "past_future", 64, page_size=16, max_new_tokens=9)[0])
        == 9
    )
    with PagedCache(model.config, policy="full") as cache:  # as transformers does it
        expected = generate(model, length, None)
        assert torch.equal(generate(model, length, cache), expected)


def test_dynamic_below_its_limit_is_not_disturbed_by_a_longer_sequence():
    model = make(DYNAMIC)
    model(ids(300))  # the model's module now has other frequencies, until a short sequence comes
    rotary = seams.rotary_of(model)()
    positions = torch.arange(100)
    torch.testing.assert_close(rotary.at(positions)[0], applied(model, positions)[0])


def test_the_reference_engine_refuses_as_well():
    from paged_kv.config import CompressionConfig

    compression = CompressionConfig(policy="past_future", budget=64)
    engine = ReferenceEngine(make(DYNAMIC), compression, page_size=16)
    engine.process(hf_models.prompt(100))
    with pytest.raises(ValueError, match="'past_future' undoes the model's RoPE"):
        engine.process(hf_models.prompt(40))


@pytest.mark.parametrize("name", ["smollm3", "cohere2"])
def test_layers_without_rope_are_refused(name):
    model = hf_models.load(name)
    cache, message = PagedCache(model.config, **PAST_FUTURE), f"a {name} model has layers without"
    with cache, pytest.raises(ValueError, match=message):
        generate(model, 80, cache)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
@pytest.mark.parametrize(("prompt", "count"), [(30, 30), (64, 1), (65, 40), (300, 40)])
def test_phi_is_compressed_on_both_sides_of_the_switch(kind, prompt, count):
    model = phi3() if kind == "phi3" else phimoe()
    expected = generate(model, prompt, None, count)  # past the switch, stock recomputes at once
    with PagedCache(model.config, policy="full") as cache:
        assert torch.equal(generate(model, prompt, cache, count), expected)
        assert cache.get_seq_length() == prompt + count - 1
    small = {"policy": "streaming", "budget": 32, "page_size": 16, "recent_window": 8}
    with PagedCache(model.config, **small) as cache:
        generate(model, prompt, cache, count)
        assert (cache.stats().evicted > 0) == (count > 1)


def test_phi_under_enable():
    model = phi3()
    with enable(model, policy="streaming", budget=64, page_size=16) as enabled:
        generate(model, 300, None, 40)
        assert enabled.stats().tokens == 339
        assert enabled.stats().evicted > 0
        with pytest.raises(ValueError, match="original_max_position_embeddings=64"):
            generate(model, 60, None, 40)
        generate(model, 30, None, 30)


def phimoe() -> Any:
    rope = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
    return make(rope, "phimoe", num_local_experts=2, sliding_window=None)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_phi_across_the_switch_is_refused(kind):
    model = phi3() if kind == "phi3" else phimoe()
    message = "'longrope'.*original_max_position_embeddings=64.*new PagedCache a prompt"
    with PagedCache(model.config, policy="streaming", budget=64, page_size=16) as cache:
        with pytest.raises(ValueError, match=message):
            generate(model, 50, cache, 30)
        assert cache.get_seq_length() == 64, "nothing was lost"
    with pytest.raises(ValueError, match=message):
        generate_batch(model, [[5] * 50], "streaming", 64, page_size=16, max_new_tokens=30)


def test_phi_without_longrope_goes_past_the_length():
    """transformers drops such a cache too, and goes on from a single token."""
    model = phi3({"rope_type": "default"})
    tokens = ids(50)
    for _ in range(40):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    with PagedCache(model.config, policy="full") as cache:
        assert torch.equal(generate(model, 50, cache, 40), tokens[0, 50:])


@pytest.mark.parametrize(("prompt", "count"), [(40, 10), (70, 10)])
def test_a_saved_cache_knows_its_side_of_the_switch(prompt, count, tmp_path):
    """Of frequencies: a cache from a file, and a copy of it, refuse to mix them, too."""
    model = make(LONGROPE)
    with PagedCache(model.config, **PAST_FUTURE) as cache:
        new = generate(model, prompt, cache, count)
        text = torch.cat([ids(prompt)[0], new])[None]
        cache.save(tmp_path / "context.safetensors")
        expected = model.generate(text, past_key_values=cache, max_new_tokens=10, do_sample=False)
    loaded = PagedCache.load(tmp_path / "context.safetensors", model.config)
    loaded.save(tmp_path / "again.safetensors")  # before any model has used it
    again = PagedCache.load(tmp_path / "again.safetensors", model.config)
    for cache in (loaded, again, copy.deepcopy(again)):
        settings = {"max_new_tokens": 10, "do_sample": False}
        assert torch.equal(model.generate(text, past_key_values=cache, **settings), expected)
        assert cache.sequences.rotary.is_past == (prompt > 64)
        if prompt < 64:
            with pytest.raises(ValueError, match="rope_type 'longrope'"):
                model(ids(20), past_key_values=cache)
