"""enable() of what stands around a model, and of models that let another one generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import load, prompt
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.models.bark.modeling_bark import BarkSemanticModel
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGeneration
from transformers.models.dia.modeling_dia import DiaForConditionalGeneration
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.moshi.modeling_moshi import MoshiForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration

from paged_kv.hf import enable
from paged_kv.hf.enabling import _reaches_hook

SNAPKV = {"policy": "snapkv", "budget": 80, "page_size": 16, "observation_window": 16}
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}


class Wrapper(torch.nn.Module):
    """As PEFT's: generate() is that of the model inside, and so is what it does not know."""

    def __init__(self, base_model: Any) -> None:
        super().__init__()
        self.base_model = base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class Closed(torch.nn.Module):
    """The same, but it hands on nothing else."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


class Composite(LlamaForCausalLM):
    """As BLIP-2: it could generate by itself, and lets another model do it."""

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model.generate(*args, **kwargs)


class Prepares(LlamaForCausalLM):
    """Does something before, and then what every model does."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)


class Names(LlamaForCausalLM):
    """The same in other words, in another method."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.by_name(*args, **kwargs)

    def by_name(self, *args: Any, **kwargs: Any) -> Any:
        return GenerationMixin.generate(self, *args, **kwargs)


def ids() -> torch.Tensor:
    return torch.tensor([prompt(100)])


def as_class(kind: type) -> Any:
    """The tests' llama with another class."""
    model = load("llama")
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_the_model_in_a_wrapper(wrap):
    """The compiler does not run: generate() of a compiled model is the model's own."""
    model = load("llama")
    with enable(model, **SNAPKV) as enabled:
        expected, stats = model.generate(ids(), **SETTINGS), enabled.stats()
    wrapped = wrap(model)
    plain = wrapped.generate(ids(), **SETTINGS)
    with enable(wrapped, **SNAPKV) as enabled:
        assert torch.equal(wrapped.generate(ids(), **SETTINGS), expected)
        assert enabled.stats() == stats
        assert stats.evicted > 0
    assert torch.equal(wrapped.generate(ids(), **SETTINGS), plain)


@pytest.mark.parametrize("kind", [Prepares, Names])
def test_an_own_generate_that_goes_on_to_transformers(kind):
    model, plain = as_class(kind), load("llama")
    with enable(plain, **SNAPKV):
        expected = plain.generate(ids(), **SETTINGS)
    with enable(model, **SNAPKV) as enabled:
        assert torch.equal(model.generate(ids(), **SETTINGS), expected)
        assert enabled.stats().evicted > 0


def test_a_model_that_lets_another_one_generate():
    model = as_class(Composite)
    model.language_model = load("llama")
    message = r"Composite\.generate\(\) does not end in .*enable the model inside"
    with pytest.raises(ValueError, match=message), enable(model, **SNAPKV):
        pytest.fail("the context began")
    with enable(model.language_model, **SNAPKV) as enabled:
        model.generate(ids(), **SETTINGS)
        assert enabled.stats().evicted > 0
    with (
        pytest.raises(ValueError, match=r"Closed does not make its cache.*enable the model inside"),
        enable(Closed(load("llama")), **SNAPKV),
    ):
        pytest.fail("the context began")


@pytest.mark.parametrize(
    ("kind", "reaches"),
    [
        (LlamaForCausalLM, True),
        (T5ForConditionalGeneration, True),
        (LlavaForConditionalGeneration, True),
        (WhisperForConditionalGeneration, True),
        (BarkSemanticModel, True),
        (MoshiForConditionalGeneration, True),
        (DiaForConditionalGeneration, True),
        (Blip2ForConditionalGeneration, False),
        (Kosmos2ForConditionalGeneration, False),
    ],
)
def test_models_of_transformers(kind, reaches):
    """Whisper calls transformers' generate() in another method; Dia makes its cache by itself."""
    assert _reaches_hook(kind) == reaches
