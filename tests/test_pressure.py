"""Budgets under pressure in real vLLM: an ample pool, siblings, priorities, aborts, the log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import engines
import pytest
import tiny_models
from policy_cases import CALIBRATED, WINDOW
from policy_loop import PolicySequence, recorded_losers
from pressure_starts import ENGINE, loop_arguments, recorded_starts
from reference_check import check_output
from reference_loop import Rule, load_model
from tiny_models import prompts_of

pytestmark = pytest.mark.vllm

BUDGET = 96
POLICIES: dict[str, dict[str, Any]] = {
    "streaming": {"policy": "streaming"},
    "snapkv": {"policy": "snapkv", **WINDOW},
    "h2o": {"policy": "h2o"},
    "calibrated": {"policy": "calibrated_attention", "fading": "on", **CALIBRATED},
    "gathering": {"policy": "calibrated_attention", "fading": "off", "statistics": "gathered"},
    "pyramidal": {"policy": "pyramidal+h2o", "budget": 128},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_models.saved("llama", tmp_path_factory.mktemp("models"))


def options(name: str, **more: Any) -> dict[str, Any]:
    return {"budget": BUDGET, "start": "pressure", **POLICIES[name], **more}


def everything(llm: Any) -> tuple[Any, Any]:
    """Tokens and logprobs of some waves, and the chunks in which they were computed."""
    found = []
    with engines.recorded_chunks(llm) as chunks:
        for prompts in (
            prompts_of(20, 96, 101, 203),
            prompts_of(150, 170, 190, shared=140),
        ):
            outputs = engines.complete(llm, prompts, 60, logprobs=3)
            found += [(list(o.token_ids), o.logprobs) for o in outputs]
    return found, list(chunks.values())


@pytest.mark.parametrize("name", POLICIES)
def test_with_ample_memory_all_is_that_of_plain_vllm(name, tiny, without_kernels):
    """Bit for bit, prefix hits included; the pages are vLLM's own in both."""
    with engines.engine(tiny, None, block_size=32, **ENGINE) as llm:
        plain = everything(llm)
    with engines.engine(tiny, options(name), **ENGINE) as llm:
        assert everything(llm) == plain
        assert not engines.scheduler(llm).pressure.counts
        requests = engines.worker(llm).compactor.requests
        assert not requests._rows, "somebody's queries were kept"


@pytest.mark.parametrize("name", POLICIES)
def test_with_ample_memory_our_kernels_write_no_side_data(name, tiny):
    unreached = {**options(name), "start": "always", "budget": 1000}
    with engines.engine(tiny, unreached, **ENGINE) as llm:
        wanted = everything(llm)
    with engines.engine(tiny, options(name), **ENGINE) as llm:
        assert everything(llm)[0] == wanted[0]
        compactor = engines.worker(llm).compactor
        stores = [s for found in compactor.observer._stores.values() for s in found]
        for tensor in (t for store in stores for t in store.side.tensors.values()):
            assert not tensor.any(), "something was written beside the pages"


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_siblings_share_their_prompt_until_they_shrink(name, tiny):
    """n > 1: each is a request, and hits the others' pages."""
    from vllm import SamplingParams

    (prompt,) = prompts_of(110)
    # Sampling that is greedy: vLLM refuses n > 1 at temperature 0.
    params = SamplingParams(n=4, top_k=1, max_tokens=200, ignore_eos=True, logprobs=0)
    settings = {**ENGINE, "num_gpu_blocks_override": 26, "enable_prefix_caching": True}
    with engines.engine(tiny, options(name), **settings) as llm:
        with (
            engines.recorded_chunks(llm) as chunks,
            recorded_losers(llm) as dropped,
            recorded_starts(llm) as starts,
        ):
            request = {"prompt_token_ids": prompt}
            outputs = llm.generate([request], params, use_tqdm=False)[0].outputs
        counts = engines.scheduler(llm).pressure.counts
    assert counts["shrunk_requests"] > 0
    assert sum(own[0][0] > 0 for own in chunks.values()) == 3
    model, rule = load_model(tiny), Rule([BUDGET] * 6)
    for request_id, own in chunks.items():
        start, scored = loop_arguments(starts, request_id, len(prompt))
        given = options(name), dropped[request_id], scored
        loop = PolicySequence(model, rule, start, *given)
        output = outputs[int(request_id.partition("_")[0])]
        assert not check_output(loop, prompt, output, own, 3e-4)


def test_priorities_and_aborts(tiny):
    """Who matters least shrinks first; who is aborted meanwhile leaves nothing behind."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    settings = {**ENGINE, "num_gpu_blocks_override": 20, "scheduling_policy": "priority"}
    with engines.engine(tiny, options("snapkv"), **settings) as llm:
        scheduler, engine = engines.scheduler(llm), llm.llm_engine
        shrunk: dict[str, int] = {}
        tell = scheduler.pressure.tell
        scheduler.pressure.tell = lambda name, start: (
            shrunk.update({name: start}),
            tell(name, start),
        )
        names = {}
        for index, prompt in enumerate(prompts_of(120, 100, 110)):
            request = {"prompt_token_ids": prompt}
            names[index] = engine.add_request(str(index), request, params, priority=index)
        steps = 0
        done = defaultdict(int)
        while engine.has_unfinished_requests():
            for output in engine.step():
                done[output.request_id] = len(output.outputs[0].token_ids)
            steps += 1
            if len(shrunk) == 1 and "aborted" not in done:
                done["aborted"] = 1
                engine.abort_request(["2"])
        first = next(iter(shrunk))
        assert first.partition("-")[0] == "2", "the least important one shrinks first"
        assert done["0"] == done["1"] == 150
        pool = engines.block_pool(llm)
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not scheduler.pressure._coming
        llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
        assert not engines.worker(llm).compactor.starts._starts


def test_the_log_says_what_it_came_to(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "0.05")
    settings = {**ENGINE, "num_gpu_blocks_override": 20}
    with (
        engines.logged("vllm.scheduler.pressure_log") as lines,
        engines.engine(tiny, options("streaming"), **settings) as llm,
    ):
        engines.complete(llm, prompts_of(20, 96, 101, 180), 130)
        counts = engines.scheduler(llm).pressure.counts
        assert not engines.scheduler(llm)._pressure_log.is_due
    told = [int(line.split("pressure: ")[1].split()[0]) for line in lines]
    assert lines
    assert sum(told) <= counts["shrunk_requests"]
    assert "shrank to their budgets" in lines[0]
