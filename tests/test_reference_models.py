"""How the reference engine enters a model of transformers: attention, head and RoPE."""

import random

import pytest
import reference_loop
import tiny_models
import torch

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import seams

FULL = CompressionConfig()


def prompt(length: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "mistral-sliding", "llama-one-kv-head"])
def test_full_equals_the_model(tmp_path, name):
    model = reference_loop.load_model(tiny_models.saved(name, tmp_path))
    tokens = prompt(150)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    engine = ReferenceEngine(model, FULL)
    hidden = torch.cat([engine.process(tokens[i : i + 50]) for i in range(0, 150, 50)])
    torch.testing.assert_close(engine.logits(hidden), expected, atol=2e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa", "the model was changed"


def test_softcaps_and_scales_of_the_head(tmp_path):
    model = reference_loop.load_model(tiny_models.saved("gemma3", tmp_path))
    model.config.final_logit_softcapping = 1.5
    tokens = torch.tensor([prompt(20)])
    with torch.inference_mode():
        expected = model(tokens).logits[0]
        own = seams.logits_of(model, model.model(tokens).last_hidden_state[0])
    assert expected.abs().max() < 1.5
    torch.testing.assert_close(own, expected)


def test_softcaps_and_sinks_in_attention():
    from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

    sizes = {key: value for key, value in tiny_models._LLAMA.items() if key != "num_hidden_layers"}
    sizes |= {"num_hidden_layers": 2, "sliding_window": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    for own in (
        Gemma2Config(**sizes, attn_logit_softcapping=2.0, query_pre_attn_scalar=1),
        GptOssConfig(**sizes, **experts),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(own, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(weight)
        tokens = prompt(100)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0]
        engine = ReferenceEngine(model, FULL)
        hidden = torch.cat([engine.process(tokens[:60]), engine.process(tokens[60:])])
        torch.testing.assert_close(engine.logits(hidden), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "cohere"])
def test_rotary_tables_undo_the_models_rotation(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = tiny_models._LLAMA | {"layer_types": ["full_attention"] * 6}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    attention = model.model.layers[1].self_attn
    keys = []  # before RoPE
    last = getattr(attention, "k_norm", attention.k_proj)
    hook = last.register_forward_hook(lambda _, __, output: keys.append(output[0]))
    engine = ReferenceEngine(model, FULL)
    engine.process(prompt(40))
    hook.remove()
    expected = keys[0] if keys[0].dim() == 3 else keys[0].unflatten(-1, (2, -1)).transpose(0, 1)
    rotary = seams.rotary_of(model)()
    cache = engine.layers[1].cache
    own = rotary.rotate(cache["keys"], cache["positions"], back=True)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    assert rotary.neox == (kind != "cohere")
