"""Real vLLM against the definition (reference_loop), and against itself where nothing may change.

All greedy. One engine per policy and budget, all prompts in one batch. Two cases on SmolLM2-135M;
the others on a small random model, which takes a tenth of the time: logprobs are compared as well,
so that a lost entry shows there, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import engines
import english
import pytest
import tiny_models
import torch
from reference_check import complete_and_check
from reference_loop import Rule, load_model, one_by_one, reference_tokens
from stores import CHUNKS, STORES, skip_without_fp8

pytestmark = [pytest.mark.vllm, pytest.mark.model]

SMOLLM2 = "smollm2"  # the others are of tiny_models
RANDOM = "llama"  # 6 layers


@dataclass(frozen=True)
class Loaded:
    """A model for the reference, and where vLLM finds it."""

    path: str
    model: Any
    text: list[int]

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        return english.cut(self.text, lengths)


@pytest.fixture(scope="module")
def models(smollm2_dir, tmp_path_factory) -> dict[str, Loaded]:
    path = tiny_models.saved(RANDOM, tmp_path_factory.mktemp("models"), tokenizer=True)
    (text,) = tiny_models.prompts_of(1500)
    return {
        SMOLLM2: Loaded(str(smollm2_dir), load_model(smollm2_dir), english.encode(smollm2_dir)),
        RANDOM: Loaded(path, load_model(path), text),
    }


# ---- the reference itself


def test_the_reference_without_a_budget_is_transformers(models):
    model, prompt = models[SMOLLM2].model, models[SMOLLM2].text[:90]
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    rule = Rule([None] * 30)
    chunks = [(0, 32), (32, 90), *one_by_one(90, 24)[1:]]
    assert reference_tokens(model, prompt, chunks, rule, 24) == output[0, 90:].tolist()


# ---- vLLM against the reference


@dataclass(frozen=True)
class Case:
    """An engine, and the rule that it must follow."""

    config: dict[str, Any]
    rule: Rule
    prompts: list[int]  # lengths
    max_tokens: int = 160
    engine: dict[str, Any] = field(default_factory=dict)
    model: str = RANDOM


PYRAMID_256 = [320] * 2 + [256] * 2 + [192] * 2
# Fractions of a pyramid with beta 2 and mean 1/2, over 24 layers: 89, 73 and 57 of 146.
PYRAMID_HALF = [Fraction(n, 146) for n in (89, 73, 57) for _ in range(8)]
LENGTHS = [20, 77, 128, 131, 300, 513]  # 128: exactly the budget

CASES = {
    "streaming": Case(
        {"policy": "streaming", "budget": 128},
        Rule([128] * 30),
        LENGTHS,
        engine=CHUNKS,
        model=SMOLLM2,
    ),
    "streaming, compress_prefill, no sinks": Case(
        {"policy": "streaming", "budget": 128, "num_sink_tokens": 0, "compress_prefill": True},
        Rule([128] * 6, num_sinks=0, compress_prefill=True),
        [77, 128, 131, 333],
        engine=CHUNKS,
    ),
    "streaming, a quarter, sinks larger than a page": Case(
        {"policy": "streaming", "budget": 0.25, "min_budget": 120}
        | {"num_sink_tokens": 40, "recent_window": 48},
        Rule([Fraction(1, 4)] * 6, num_sinks=40, min_budget=120),
        [33, 120, 290, 600],
    ),
    "streaming, half, compress_prefill, pages of 64": Case(
        {"policy": "streaming", "budget": 0.5, "min_budget": 130, "compress_prefill": True},
        Rule([Fraction(1, 2)] * 6, page_size=64, min_budget=130, compress_prefill=True),
        [50, 130, 410],
        engine=CHUNKS | {"block_size": 64},
    ),
    "streaming, pages of 128, asynchronous": Case(
        {"policy": "streaming", "budget": 250, "recent_window": 100},
        Rule([250] * 6, page_size=128),
        [60, 250, 405],
        engine={"block_size": 128, "async_scheduling": True},
    ),
    "streaming, a budget of no whole pages": Case(
        {"policy": "streaming", "budget": 100, "num_sink_tokens": 40, "recent_window": 28},
        Rule([100] * 6, num_sinks=40),
        [99, 100, 101],
        max_tokens=128,
    ),
    "pyramidal": Case(
        {"policy": "pyramidal+streaming", "budget": 256},
        Rule(PYRAMID_256),
        [60, 192, 300, 420],
        max_tokens=256,
        engine=CHUNKS,
    ),
    "pyramidal, half, compress_prefill, skipped layers": Case(
        {"policy": "pyramidal+streaming", "budget": 0.5, "min_budget": 96, "compress_prefill": True}
        | {"skip_layers": [0, 1, 2, 3, 4, 29]},
        Rule([*[None] * 5, *PYRAMID_HALF, None], min_budget=96, compress_prefill=True),
        [70, 256, 410],
        engine=CHUNKS,
        model=SMOLLM2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_reference_s(name, models):
    case = CASES[name]
    model = models[case.model]
    prompts = model.prompts(case.prompts)
    with engines.engine(model.path, case.config, **case.engine) as llm:
        complete_and_check(llm, model.model, prompts, case.rule, case.max_tokens)
        assert engines.worker(llm).compactor.num_events > 0


@pytest.mark.parametrize(
    "compress_prefill", [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_preempted_requests(compress_prefill, models):
    """Four requests that grow to five pages each in a pool of 13: recomputed, in other chunks.

    test_preemption.py has more of it, without compress_prefill, on the small model.
    """
    config = {"policy": "streaming", "budget": 128, "compress_prefill": compress_prefill}
    rule = Rule([128] * 6, compress_prefill=compress_prefill)
    model = models[RANDOM]
    prompts = model.prompts([64, 75, 40, 90])
    pool = {"num_gpu_blocks_override": 14, **CHUNKS}
    with engines.engine(model.path, config, **pool) as llm:
        chunks = complete_and_check(llm, model.model, prompts, rule, max_tokens=160)
    restarts = [b for own in chunks for (_, end), (b, _) in pairwise(own) if b != end]
    assert restarts, "the pool was large enough"


# ---- vLLM against itself: what nothing exceeds changes nothing

LARGE = {"budget": 2048}


def scored(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """Tokens and the logprobs of the best five of each."""
    outputs = engines.complete(llm, prompts, 48, logprobs=5)
    return [
        [(token, logprob.logprob) for best in output.logprobs for token, logprob in best.items()]
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("store", "configs"),
    [
        ("float32", [{"policy": "full"}, {"policy": "streaming"} | LARGE]),
        ("bfloat16", [{"policy": "pyramidal+streaming"} | LARGE]),
        ("fp8", [{"policy": "pyramidal+streaming"} | LARGE]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_budget_that_nothing_exceeds_changes_no_bit(store, configs, models, without_kernels):
    skip_without_fp8(store)
    model = models[RANDOM]
    prompts = model.prompts([30, 128, 257])
    results = []
    for config in [None, *configs]:
        settings = {"block_size": 32, **CHUNKS, **STORES[store]}
        with engines.engine(model.path, config, **settings) as llm:
            results.append(scored(llm, prompts))
    for config, result in zip(configs, results[1:], strict=True):
        assert result == results[0], config


def test_full_leaves_the_engine_alone(smollm2_dir):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    seen = []
    for additional in ({}, {"paged_kv": {"policy": "full", "budget": 128}}):
        args = EngineArgs(model=str(smollm2_dir), additional_config=additional)
        config = args.create_engine_config()
        parallel, scheduler = config.parallel_config, config.scheduler_config
        seen.append((parallel.worker_cls, scheduler.scheduler_cls, config.cache_config.block_size))
        assert config.additional_config == additional
    assert seen == [("vllm.v1.worker.cpu_worker.CPUWorker", None, 128)] * 2
