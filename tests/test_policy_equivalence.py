"""Every policy in real vLLM gives token for token what its definition gives in a plain loop."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import engines
import pytest
import tiny_models
from policy_cases import CALIBRATED, WINDOW, engine_cases
from policy_loop import complete_and_check
from reference_loop import Rule, load_model
from tiny_models import prompts_of

pytestmark = pytest.mark.vllm

BUDGET = 96
CHUNKS = {"max_num_batched_tokens": 100, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_models.saved("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(tiny) -> Any:
    return load_model(tiny)


def check(tiny, model, config, rule, waves, max_tokens=70, **engine) -> list[Any]:
    """Waves of prompts, one after the other; returns the chunks of all."""
    settings = {**CHUNKS, "skip_tokenizer_init": True, **engine}
    # Sums of keys are large, and their logits inexact.
    tolerance = 1e-3 if config.get("mode") == "sum" else 2e-4
    chunks, loops = [], []
    with engines.engine(tiny, config, **settings) as llm:
        total = engines.block_pool(llm).get_num_free_blocks()
        for prompts in waves:
            seen = complete_and_check(llm, model, prompts, rule, config, max_tokens, tolerance)
            chunks += seen[0]
            loops += seen[1]
        assert engines.block_pool(llm).get_num_free_blocks() == total
    assert sum(loop.num_drops for loop in loops) > 50
    assert sum(loop.num_ties for loop in loops) <= 3
    return chunks


@pytest.mark.parametrize(("name", "options"), engine_cases())
def test_tokens_are_those_of_the_definition(name, options, tiny, model):
    """Prompts in chunks that end anywhere in a page; 101: its last chunk is one token."""
    config = {"policy": name, "budget": BUDGET, **options}
    check(tiny, model, config, Rule([BUDGET] * 6), [prompts_of(20, 96, 101, 203)])


SNAPKV = {"policy": "snapkv", "budget": BUDGET, **WINDOW}
H2O = {"policy": "h2o", "budget": BUDGET}
# At the default threshold, a half, a cosine of the test model is half but for the last bit.
MERGE = {"policy": "value_merge", "of": "h2o", "budget": BUDGET, "threshold": 0.45}
RATED = {"policy": "calibrated_attention", "fading": "off", "budget": BUDGET, **CALIBRATED}
FADING = {**RATED, "fading": "on", "half_life": 40}
MERGED = {**FADING, "policy": "value_merge", "of": "calibrated_attention", "threshold": 0.45}
WHO = "config", [SNAPKV, H2O, MERGE, RATED, FADING, MERGED]
EVICTING = "config", [SNAPKV, H2O, RATED, FADING]


def named(config) -> str:
    return "+".join(str(config[key]) for key in ("policy", "of", "fading") if key in config)


@pytest.mark.parametrize(*WHO, ids=named)
def test_pyramids(config, tiny, model):
    """Budgets by tier: 160, 128 and 96."""
    config = {**config, "policy": f"pyramidal+{config['policy']}", "budget": 128}
    rule = Rule([160] * 2 + [128] * 2 + [96] * 2)
    check(tiny, model, config, rule, [prompts_of(60, 150, 230)])


@pytest.mark.parametrize(*EVICTING, ids=named)
def test_a_fraction_between_the_chunks_of_a_prompt(config, tiny, model):
    config = {**config, "budget": 0.5, "min_budget": 80, "compress_prefill": True}
    rule = Rule([Fraction(1, 2)] * 6, min_budget=80, compress_prefill=True)
    check(tiny, model, config, rule, [prompts_of(70, 300, 210)])


@pytest.mark.parametrize(*WHO, ids=named)
def test_preempted_requests(config, tiny, model):
    """Their queries, scores and weights are computed anew with their entries."""
    waves = [prompts_of(64, 75, 40, 90)]
    rule = Rule([BUDGET] * 6)
    chunks = check(tiny, model, config, rule, waves, 120, num_gpu_blocks_override=14)
    restarts = [b for own in chunks for (_, end), (b, _) in pairwise(own) if b != end]
    assert restarts, "the pool was large enough"


@pytest.mark.parametrize(*WHO, ids=named)
def test_prefix_hits(config, tiny, model):
    """A hit brings positions along, no scores; the observation window is computed in any case."""
    first, second = prompts_of(210, 230, shared=200)
    longer = [*first, *second[200:]]
    waves = [[first], [second, longer, first]]
    chunks = check(tiny, model, config, Rule([BUDGET] * 6), waves, enable_prefix_caching=True)
    starts = [own[0][0] for own in chunks]
    assert starts[0] == 0
    assert min(starts[1:]) >= 192
    window = config.get("observation_window", 1)
    assert starts[3] == (210 - window) // 32 * 32


def test_a_hit_changes_nothing_where_only_the_window_is_observed(tiny):
    prompts = prompts_of(210, 230, shared=200)
    outputs = []
    for caching in (False, True):
        settings = {**CHUNKS, "skip_tokenizer_init": True, "enable_prefix_caching": caching}
        with engines.engine(tiny, SNAPKV, **settings) as llm:
            outputs.append([engines.generate(llm, [prompt], 70)[0] for prompt in prompts * 2])
    assert outputs[0] == outputs[1]
