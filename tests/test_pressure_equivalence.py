"""Sequences that shrink under pressure, in real vLLM: what a loop told of each start gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import engines
import pytest
import tiny_models
from policy_cases import CALIBRATED, WINDOW, engine_cases
from policy_loop import complete_and_check
from pressure_starts import ENGINE
from reference_loop import Rule, load_model
from tiny_models import prompts_of

pytestmark = pytest.mark.vllm

BUDGET = 96
LENGTHS = (20, 96, 101, 180)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_models.saved("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(tiny) -> Any:
    return load_model(tiny)


def check(
    tiny: str,
    model: Any,
    config: dict[str, Any],
    rule: Rule,
    num_pages: int,
    waves: list[list[list[int]]] | None = None,
    max_tokens: int = 130,
    **more: Any,
) -> tuple[Any, list[Any]]:
    """Waves of prompts, token by token; returns the scheduler's counts and all chunks."""
    config, chunks, dropped = {**config, "start": "pressure"}, [], 0
    settings = {**ENGINE, "num_gpu_blocks_override": num_pages, **more}
    tolerance = 1e-3 if config.get("mode") == "sum" else 3e-4  # see test_policy_equivalence
    with engines.engine(tiny, config, **settings) as llm:
        for prompts in waves or [prompts_of(*LENGTHS)]:
            seen = complete_and_check(llm, model, prompts, rule, config, max_tokens, tolerance)
            chunks += seen[0]
            dropped += sum(loop.num_drops for loop in seen[1])
            assert sum(loop.num_ties for loop in seen[1]) <= 3
        pool = engines.block_pool(llm)
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        counts = engines.scheduler(llm).pressure.counts
    assert counts["shrunk_requests"] > 0
    assert dropped > 0
    return counts, chunks


def restarts(chunks: list[Any]) -> int:
    return sum(start < end for own in chunks for (_, end), (start, _) in pairwise(own))


@pytest.mark.parametrize(("name", "options"), engine_cases())
def test_tokens_are_those_of_the_definition(name, options, tiny, model):
    """A pool too small for all, large enough for their budgets: nobody is preempted."""
    if name == "attention":  # a request that ends before its window does never shrinks
        options = WINDOW
    config = {"policy": name, "budget": BUDGET, **options}
    _, chunks = check(tiny, model, config, Rule([BUDGET] * 6), 22)
    assert restarts(chunks) == 0


SNAPKV = {"policy": "snapkv", "budget": BUDGET, **WINDOW}
H2O = {"policy": "h2o", "budget": BUDGET}
STREAMING = {"policy": "streaming", "budget": BUDGET}
RATED = {"policy": "calibrated_attention", "fading": "off", "budget": BUDGET, **CALIBRATED}
FADING = {**RATED, "fading": "on", "half_life": 40}
MERGE = {"policy": "value_merge", "of": "h2o", "budget": BUDGET}
WHO = "config", [STREAMING, SNAPKV, H2O, RATED, FADING, MERGE]


def named(config) -> str:
    return "+".join(str(config[key]) for key in ("policy", "of", "fading") if key in config)


@pytest.mark.parametrize(*WHO, ids=named)
def test_pyramids(config, tiny, model):
    """Budgets by tier: 160, 128 and 96. All groups of a request shrink together."""
    config = {**config, "policy": f"pyramidal+{config['policy']}", "budget": 128}
    rule = Rule([160] * 2 + [128] * 2 + [96] * 2)
    _, chunks = check(tiny, model, config, rule, 70)
    assert restarts(chunks) == 0


@pytest.mark.parametrize(*WHO, ids=named)
def test_preempted_requests_keep_their_starts(config, tiny, model):
    """Too small for the budgets, too, which short prompts grow to."""
    _, chunks = check(tiny, model, config, Rule([BUDGET] * 6), 14, [prompts_of(20, 24, 30, 40)])
    assert restarts(chunks) > 0


@pytest.mark.parametrize(*WHO, ids=named)
def test_swapped_requests(config, tiny, model):
    """Swap comes after shrinking; what is saved raw comes back raw, and shrinks later."""
    config = {**config, "swap_space": 0.05}
    waves = [prompts_of(20, 24, 30, 40)]
    _, chunks = check(tiny, model, config, Rule([BUDGET] * 6), 14, waves)
    assert restarts(chunks) == 0


@pytest.mark.parametrize(*WHO, ids=named)
def test_shared_prefixes(config, tiny, model):
    """Those that share a prompt shrink to pages of their own; others hit what is left of it."""
    first, *others = prompts_of(110, 115, 120, 105, shared=100)
    waves = [[first, *others], [others[0], first]]
    rule = Rule([BUDGET] * 6)
    check(tiny, model, config, rule, 26, waves, 200, enable_prefix_caching=True)
