"""Spill in real vLLM: entries go down and come back as in plain loops; what ends leaves nothing."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import tiny_models
import torch
from engines import Tokens
from policy_cases import CALIBRATED
from reference_loop import Rule, load_model
from vllm import SamplingParams
from vllm_spill_loop import complete_and_check

from paged_kv.store.spill_stores import SpillShape
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.vllm.worker.spilling import RequestStores

pytestmark = pytest.mark.vllm

BUDGET = 96
SETTINGS = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 100,
    "kv_cache_memory_bytes": 64 << 20,
}
SPILL = {"budget": BUDGET, "spill": True, "spill_interval": 0}
SNAPKV = {**SPILL, "policy": "snapkv", "observation_window": 8}


@pytest.fixture(scope="module")
def model(tiny) -> Any:
    return load_model(tiny)


def prompts_of(*lengths: int, seed: int = 0) -> list[Tokens]:
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(n)] for n in lengths]


def spilled(llm: Any) -> Any:
    return engines.worker(llm).compactor.spilled


def assert_nothing_is_left(llm: Any) -> None:
    llm.llm_engine.step()  # the worker is told who has ended
    assert not spilled(llm)._stores
    pool = engines.block_pool(llm)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


RATED = {"policy": "calibrated_attention", **CALIBRATED}
PYRAMID = {**SNAPKV, "policy": "pyramidal+snapkv", "budget": 128}
TIERS = [160] * 2 + [128] * 2 + [96] * 2
HALF = {"budget": 0.5, "min_budget": 80, "compress_prefill": True}
CASES = [
    ({**SPILL, "policy": "streaming", "fetch_limit": 3, "spill_window": 8}, Rule([BUDGET] * 6)),
    (
        {**SPILL, **HALF, "policy": "streaming", "spill_budget": 100},
        Rule([Fraction(1, 2)] * 6, min_budget=80, compress_prefill=True),
    ),
    ({**SNAPKV, "spill_window": 5, "spill_threshold": 1.5}, Rule([BUDGET] * 6)),
    ({**SNAPKV, "compress_prefill": True}, Rule([BUDGET] * 6, compress_prefill=True)),
    ({**PYRAMID, "fetch_limit": 7}, Rule(TIERS)),
    ({**PYRAMID, "compress_prefill": True}, Rule(TIERS, compress_prefill=True)),
    ({**SPILL, "policy": "h2o", "fetch_limit": 5}, Rule([BUDGET] * 6)),
    ({**SPILL, **RATED, "fading": "off", "fetch_limit": 5}, Rule([BUDGET] * 6)),
    ({**SPILL, **RATED, "fading": "on", "half_life": 40}, Rule([BUDGET] * 6)),
]


@pytest.mark.parametrize(("config", "rule"), CASES, ids=[str(config) for config, _ in CASES])
def test_tokens_are_those_of_the_definition(config, rule, tiny, model):
    """Prompts in chunks; entries are lost where the budget of the tier is small."""
    with engines.engine(tiny, config, **SETTINGS) as llm:
        _, loops = complete_and_check(llm, model, prompts_of(20, 101, 203, 400), rule, config, 70)
        assert_nothing_is_left(llm)
    assert sum(loop.num_fetched for loop in loops) > 100
    assert sum(loop.num_ranked for loop in loops) > 0 or "fetch_limit" not in config
    assert (sum(loop.num_lost for loop in loops) > 0) == ("spill_budget" in config)
    assert sum(loop.num_ties for loop in loops) <= 3


def test_files(tiny, model, tmp_path):
    """Most of the tier is in files, which have no names."""
    config = {**SNAPKV, "spill_dir": str(tmp_path), "spill_host_budget": 40}
    with engines.engine(tiny, config, **SETTINGS) as llm:
        complete_and_check(llm, model, prompts_of(101, 400), Rule([BUDGET] * 6), config, 70)
        (stores,) = spilled(llm)._stores.values()  # the other request ended before the last step
        assert sum(store.num_bytes["mmap"] for store in stores.values()) > 0
        assert not list(tmp_path.iterdir())
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("config", [{**SPILL, "policy": "streaming"}, SNAPKV], ids=str)
def test_preempted_requests_spill_anew(config, tiny, model):
    """Recomputing is what preemption means without swap; the second time gives other chunks."""
    with engines.engine(tiny, config, **SETTINGS, num_gpu_blocks_override=14) as llm:
        prompts, rule = prompts_of(64, 75, 40, 90), Rule([BUDGET] * 6)
        chunks, _ = complete_and_check(llm, model, prompts, rule, config, 120)
        assert_nothing_is_left(llm)
    assert [b for own in chunks for (_, end), (b, _) in pairwise(own) if b != end], "no preemption"


@pytest.mark.parametrize("config", [{**SPILL, "policy": "streaming"}, SNAPKV], ids=str)
def test_who_shrinks_under_pressure_spills(config, tiny, model):
    config = {**config, "start": "pressure"}
    with engines.engine(tiny, config, **SETTINGS, num_gpu_blocks_override=20) as llm:
        prompts, rule = prompts_of(64, 175, 40, 150), Rule([BUDGET] * 6)
        _, loops = complete_and_check(llm, model, prompts, rule, config, 150)
        assert engines.scheduler(llm).pressure.counts["shrunk_requests"] > 0
        assert_nothing_is_left(llm)
    assert sum(loop.num_fetched for loop in loops) > 0


def test_what_ends_leaves_nothing(tiny):
    """Requests that are aborted, and that end while others run; the counters add up."""
    with engines.engine(tiny, {**SNAPKV, "spill_budget": 200}, **SETTINGS) as llm:
        for name, prompt in zip("abc", prompts_of(300, 310, 320), strict=True):
            params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        stores, during = {}, None
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            stores |= {name.partition("-")[0]: own for name, own in spilled(llm)._stores.items()}
            if "b" in stores and during is None:
                during = engines.worker(llm).compactor.spill_stats()
                llm.llm_engine.abort_request(["b"])
        assert sorted(stores) == ["a", "b", "c"]
        assert_nothing_is_left(llm)
        every = [store for own in stores.values() for store in own.values()]
        assert not any(sum(store.num_bytes.values()) for store in every)
        stats = engines.worker(llm).compactor.spill_stats()
    heads = 2 * 6  # of all layers
    assert (during.requests, during.entries, during.dropped) == (2, 2 * 192 * heads, 0)
    assert during.host_bytes > during.entries * 2 * 32 * 4  # keys and values of 32 numbers
    assert (stats.requests, stats.entries, stats.host_bytes) == (0, 0, 0)
    # 359 and 379 tokens at the end, and b was aborted at 310.
    assert stats.spilled == (256 + 192 + 256) * heads
    assert stats.dropped == 2 * (256 - 200) * heads
    assert stats.fetched > 0


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_stores_of_preempted_requests(runner):
    """They are dropped, unless somebody keeps the pages until the request resumes."""
    spill = RequestStores(SpillSpace(budget=10, host_budget=10))
    shape = SpillShape((2, 1), (16, 16), torch.float32)
    kept, *_ = [spill.of(request, "layers", shape) for request in "abc"]

    def update(finished=(), preempted=(), resumed=()):
        cached = SimpleNamespace(resumed_req_ids=set(resumed) if runner == "V1" else set())
        new = [SimpleNamespace(req_id=name) for name in resumed if runner == "V2"]
        spill.update(
            SimpleNamespace(
                finished_req_ids=set(finished),
                preempted_req_ids=set(preempted),
                scheduled_cached_reqs=cached,
                scheduled_new_reqs=new,
            )
        )
        return sorted(spill._stores)

    spill.keep("a")
    assert update(preempted="ab") == ["a", "c"]
    assert update() == ["a", "c"]
    assert update(resumed="a") == ["a", "c"]
    assert spill.of("a", "layers", shape) is kept
    assert update(preempted="a") == ["c"]  # kept once, not for ever
    spill.of("a", "layers", shape)
    spill.keep("a")
    assert update(preempted="a", resumed="a") == ["a", "c"]
    spill.keep("c")
    assert update(preempted="c") == ["a", "c"]
    spill.drop("c")  # its pages were lost on the way
    assert update(resumed="c") == ["a"]
    assert update(finished="a") == []


def test_both_engines_look_and_rest_alike(tiny):
    """By default a sequence that decodes looks at its tier now and then: here, three do not."""
    from transformers import AutoModelForCausalLM

    from paged_kv.hf import PagedCache

    config = {"policy": "streaming", "budget": BUDGET, "spill": True, "fetch_limit": 16}
    [prompt] = prompts_of(300)
    with engines.engine(tiny, config, **SETTINGS) as llm:
        [found] = engines.generate(llm, [prompt], 110)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    cache = PagedCache(model.config, **config)
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=110,
        min_new_tokens=110,
        do_sample=False,
        pad_token_id=0,
    )
    assert output[0, 300:].tolist() == found
    assert cache.stats().fetched > 0
