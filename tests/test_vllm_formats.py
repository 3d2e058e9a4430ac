"""Page formats in real vLLM: tokens are those of plain loops whose entries pass through a codec."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import engines
import pytest
import tiny_models
from format_loop import EveryChunk, complete_and_check
from reference_loop import Rule, load_model

pytestmark = pytest.mark.vllm

BUDGET, LAYERS, MAX_SEQS = 96, 6, 16
SETTINGS = {
    "max_num_seqs": MAX_SEQS,
    "max_num_batched_tokens": 100,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
    "block_size": 32,
}
MIXED = ["int8", "int4", "int4", "native", "int4", "int8"]


@pytest.fixture(scope="module")
def model(tiny) -> Any:
    return load_model(tiny)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """A file as `paged-kv calibrate formats` writes it."""
    file = tmp_path_factory.mktemp("formats") / "mixed.json"
    file.write_text(json.dumps({"layers": MIXED}))
    return str(file)


def prompts_of(*lengths: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(shared)
    prefix = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(shared)]
    return [
        prefix + [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length - shared)]
        for length in lengths
    ]


def page_bytes(formats: list[str], page_size: int) -> int:
    """Of all layers: 2 KV heads of 32 numbers, float32 or quantized with bfloat16 scales."""
    entry = {"native": 256, "int8": 2 * (32 + 2), "fp8": 2 * (32 + 2), "int4": 2 * (16 + 4)}
    return sum(2 * page_size * entry[name] for name in formats)


# (config, arguments of the engine, formats of the layers)
WITHOUT_A_POLICY = {
    "int8 as vLLM says it": ({}, {"kv_cache_dtype": "int8_per_token_head"}, ["int8"] * LAYERS),
    "int4, vLLM's page size": (
        {},
        {"kv_cache_dtype": "int4_per_token_head", "block_size": None},
        ["int4"] * LAYERS,
    ),
    "fp8 of ours": ({"page_format": "fp8"}, {}, ["fp8"] * LAYERS),
    "by layer, residual": ({"page_format": "mixed", "residual_pages": 2}, {}, MIXED),
}


@pytest.mark.parametrize("case", WITHOUT_A_POLICY)
def test_tokens_without_a_policy(case, tiny, model, mixed):
    """Prompts in chunks that end anywhere in a page; then prefix hits."""
    config, arguments, formats = WITHOUT_A_POLICY[case]
    if config.get("page_format") == "mixed":
        config = config | {"page_format": mixed}
    page_size = arguments.get("block_size", 32) or 128
    rule = (EveryChunk if "residual_pages" in config else Rule)([None] * LAYERS, page_size)
    first, second = prompts_of(190, 210, shared=150)
    with engines.engine(tiny, config, **{**SETTINGS, **arguments}) as llm:
        assert engines.scheduler(llm).__class__.__name__ == "Scheduler"
        pool = engines.block_pool(llm)
        quantized = [name for name in formats if name != "native"]
        ring = config.get("residual_pages", 0) * page_bytes(["native"] * len(quantized), 32)
        memory = SETTINGS["kv_cache_memory_bytes"] - (MAX_SEQS + 1) * ring
        assert pool.num_gpu_blocks == memory // page_bytes(formats, page_size)
        waves = [[*prompts_of(20, 101), first], [second, first[:170]]]
        chunks = complete_and_check(llm, model, waves, rule, formats, config, 50)
        assert [own[0][0] for own in chunks[3:]] == [
            length // page_size * page_size for length in (150, 169)
        ]


RESIDUAL = {"residual_pages": 1}
UNDER_A_POLICY = {
    "streaming": ({"policy": "streaming", "page_format": "int8"}, {}, "int8"),
    "snapkv": (
        {"policy": "snapkv", "observation_window": 8, **RESIDUAL},
        {"kv_cache_dtype": "int4_per_token_head"},
        "int4",
    ),
    "h2o": ({"policy": "h2o", "page_format": "fp8"}, {}, "fp8"),
    "value_merge": (
        {"policy": "value_merge", "of": "knorm", "page_format": "int8", **RESIDUAL},
        {},
        "int8",
    ),
    "by layer": ({"policy": "h2o", "page_format": "mixed"}, {}, None),
}


@pytest.mark.parametrize("case", UNDER_A_POLICY)
def test_tokens_under_a_policy(case, tiny, model, mixed):
    """Moved, copied for the cache, and seen by a policy as they are stored; then prefix hits."""
    config, arguments, name = UNDER_A_POLICY[case]
    config = {**config, "budget": BUDGET}
    if config.get("page_format") == "mixed":
        config["page_format"] = mixed
    formats = [name] * LAYERS if name else MIXED
    rule = (EveryChunk if "residual_pages" in config else Rule)([BUDGET] * LAYERS)
    with engines.engine(tiny, config, **SETTINGS, **arguments) as llm:
        total = engines.block_pool(llm).get_num_free_blocks()
        first = prompts_of(20, 101, 150)
        waves = [first, [first[2][:140]]]
        chunks = complete_and_check(llm, model, waves, rule, formats, config, 60)
        assert chunks[3][0][0] == 128
        assert engines.worker(llm).compactor.num_events > 0
        assert engines.block_pool(llm).get_num_free_blocks() == total


@pytest.mark.parametrize("case", UNDER_A_POLICY)
def test_tokens_under_pressure(case, tiny, model, mixed):
    """They shrink when the pool is full; with a residual, whose pages stay as they are."""
    config, arguments, name = UNDER_A_POLICY[case]
    config = {**config, "budget": BUDGET, "start": "pressure"}
    if config.get("page_format") == "mixed":
        config["page_format"] = mixed
    formats = [name] * LAYERS if name else MIXED
    rule = (EveryChunk if "residual_pages" in config else Rule)([BUDGET] * LAYERS)
    few = {"num_gpu_blocks_override": 20, "max_model_len": 512}
    with engines.engine(tiny, config, **SETTINGS, **arguments, **few) as llm:
        waves = [prompts_of(20, 101, 150)]
        complete_and_check(llm, model, waves, rule, formats, config, 130)
        assert engines.scheduler(llm).pressure.counts["shrunk_requests"] > 0
        assert engines.worker(llm).compactor.num_events > 0


@pytest.mark.parametrize("policy", [{}, {"policy": "streaming", "budget": BUDGET}], ids=str)
def test_preempted_requests(policy, tiny, model):
    """What was in the ring of native pages is computed anew, in other chunks."""
    config = {**policy, "page_format": "int8", "residual_pages": 1}
    rule = EveryChunk([policy.get("budget")] * LAYERS)
    few = {"num_gpu_blocks_override": 14, "max_model_len": 320, "enable_prefix_caching": False}
    with engines.engine(tiny, config, **SETTINGS, **few) as llm:
        waves = [prompts_of(64, 75, 40, 90)]
        chunks = complete_and_check(llm, model, waves, rule, ["int8"] * LAYERS, config, 120)
    restarts = [b for own in chunks for (_, end), (b, _) in pairwise(own) if b != end]
    assert restarts, "the pool was large enough"
