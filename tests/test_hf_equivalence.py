"""Two engines, one answer: every policy in transformers gives vLLM's tokens, on a real model.

An engine and 512 tokens for each of 20 policies take 15 minutes: `pytest -m exhaustive` runs all of
them, `make test` four that cover what policies read and do (test_policy_equivalence.py and
test_hf_reference.py have each of them on a small model). So with the page formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engines
import pytest
import torch

from paged_kv import registry
from paged_kv.bench.prompts import built_in
from paged_kv.hf import PagedCache
from paged_kv.hf.loading import encode, load_model

pytestmark = [pytest.mark.vllm, pytest.mark.model, pytest.mark.slow]

BUDGET, PROMPT, NEW = 192, 300, 256
ALWAYS = {"streaming", "h2o", "pyramidal+snapkv", "value_merge"}
NAMES = [
    pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.exhaustive])
    for name in [*registry.available(), "pyramidal+snapkv"]
    if name != "full"
]


@pytest.fixture(scope="module")
def model(smollm2_dir) -> Any:
    loaded = load_model(smollm2_dir)
    loaded.generation_config.eos_token_id = None  # as vLLM's ignore_eos: a token like others
    return loaded


@pytest.fixture(scope="module")
def prompt(smollm2_dir) -> list[int]:
    return encode(smollm2_dir, " ".join(built_in(16)))[:PROMPT]


@pytest.mark.parametrize("policy", NAMES)
def test_tokens_are_those_of_vllm(policy, smollm2_dir, model, prompt):
    assert len(prompt) == PROMPT > BUDGET
    config = {"policy": policy, "budget": BUDGET}
    with engines.engine(str(smollm2_dir), config) as llm:
        expected = engines.generate(llm, [prompt], NEW)[0]
    with PagedCache(model.config, policy, BUDGET) as cache:
        found = model.generate(
            torch.tensor([prompt]),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=NEW,
        )
        stats = cache.stats()
    assert stats.evicted + stats.merged > 30 * (PROMPT - BUDGET)
    assert found[0, PROMPT:].tolist() == expected


# Policies that choose by position: the noise that moves numbers to another level (below) also moves
# scores, and with them entries that are near a tie. One engine with two builds of the same kernels
# then keeps different entries in half of the heads, and single logits differ by 7.
FORMATS = [
    ("int8", "streaming", 0),
    ("int8", "full", 0),
    ("int8", "streaming", 1),
    ("fp8", "streaming", 0),
    ("int4", "full", 0),
    ("int4", "streaming", 1),
    ("int4", "pyramidal+streaming", 0),
]
ROUNDING = 1e-6  # float32 of another CPU's sums


@pytest.mark.parametrize(
    ("page_format", "policy", "residual"),
    [
        pytest.param(*one, marks=[] if one is FORMATS[0] else [pytest.mark.exhaustive])
        for one in FORMATS
    ],
)
def test_page_formats(page_format, policy, residual, smollm2_dir, model, prompt):
    """Each of vLLM's tokens is the choice of transformers after those before it.

    Where two tokens are near a tie, sums in another order decide: they move some numbers to
    another level of the format. How much that is, depends on the format and is measured: what
    inputs that differ by rounding do to the lead of the best token over the second.
    """
    config = {"policy": policy, "page_format": page_format, "residual_pages": residual}
    if policy != "full":
        config["budget"] = BUDGET
    with engines.engine(str(smollm2_dir), config) as llm:
        expected = torch.tensor(engines.generate(llm, [prompt], NEW)[0])
    logits = logits_along(model, config, prompt, expected)
    with rounded_otherwise(model):
        rounded = logits_along(model, config, prompt, expected)
    best, second = logits.topk(2, -1).indices.split(1, -1)
    lead, lead_rounded = (
        each.gather(1, best) - each.gather(1, second) for each in (logits, rounded)
    )
    noise, turned = (lead - lead_rounded).abs().max(), (rounded.argmax(-1) != best[:, 0]).sum()
    behind = logits.amax(-1) - logits.gather(1, expected[:, None])[:, 0]
    assert behind.max() <= noise, (behind, noise)
    assert (behind > 0).sum() <= NEW // 50 + 2 * turned, (behind, turned)


def logits_along(model: Any, config: dict[str, Any], prompt: list[int], tokens: Any) -> Any:
    """[tokens, vocabulary]: the logits for each of the tokens, after the prompt and those before"""
    with PagedCache(model.config, **config) as cache, torch.inference_mode():
        rows = [model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]]
        for token in tokens[:-1].tolist():
            rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@contextmanager
def rounded_otherwise(model: Any) -> Iterator[None]:
    """The model's embeddings with a noise of the size of rounding."""
    generator = torch.Generator().manual_seed(0)

    def add(module: Any, inputs: Any, output: Any) -> Any:
        return output * (1 + ROUNDING * torch.randn(output.shape, generator=generator))

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
