"""Two engines, one answer: every policy in transformers gives vLLM's tokens, on a real model.

An engine and 512 tokens for each of 20 policies take 15 minutes: `pytest -m exhaustive` runs all of
them, `make test` 192 tokens of four that cover what policies read and do
(test_policy_equivalence.py and test_hf_against_reference.py have each of them on a small model).
Page formats: test_hf_format_equivalence.py.
"""

from __future__ import annotations

from typing import Any

import engines
import pytest
import torch

from paged_kv import registry
from paged_kv.bench.prompts import built_in
from paged_kv.hf import PagedCache
from paged_kv.hf.driver.loading import encode, load_model

pytestmark = [pytest.mark.vllm, pytest.mark.model, pytest.mark.slow]

BUDGET, PROMPT = 192, 300
NEW, MANY = 96, 256  # compactions: after the prompt, and three or eight more
ALWAYS = ["streaming", "h2o", "pyramidal+snapkv", "value_merge"]
NAMES = [name for name in [*registry.available(), "pyramidal+snapkv"] if name != "full"]
CASES = [
    *((name, NEW) for name in ALWAYS),
    *(pytest.param(name, MANY, marks=pytest.mark.exhaustive) for name in NAMES),
]


@pytest.fixture(scope="module")
def model(smollm2_dir) -> Any:
    loaded = load_model(smollm2_dir)
    loaded.generation_config.eos_token_id = None  # as vLLM's ignore_eos: a token like others
    return loaded


@pytest.fixture(scope="module")
def prompt(smollm2_dir) -> list[int]:
    return encode(smollm2_dir, " ".join(built_in(16)))[:PROMPT]


@pytest.mark.parametrize(("policy", "num_new"), CASES)
def test_tokens_are_those_of_vllm(policy, num_new, smollm2_dir, model, prompt):
    assert len(prompt) == PROMPT > BUDGET
    config = {"policy": policy, "budget": BUDGET}
    with engines.engine(str(smollm2_dir), config) as llm:
        expected = engines.generate(llm, [prompt], num_new)[0]
    with PagedCache(model.config, policy, BUDGET) as cache:
        found = model.generate(
            torch.tensor([prompt]),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=num_new,
        )
        stats = cache.stats()
    assert stats.evicted + stats.merged > 30 * (PROMPT - BUDGET)
    assert found[0, PROMPT:].tolist() == expected
