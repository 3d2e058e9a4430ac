"""Pages in a running engine: freed when the schedule says, all back in the end, and what fits."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from engines import (
    block_pool,
    engine,
    engine_core,
    generate,
    logged,
    recorded_chunks,
    scheduler,
    worker,
)

from paged_kv.core.schedule import Schedule, cdiv
from paged_kv.vllm.frontend import intake

pytestmark = pytest.mark.vllm

BUDGET = 96
STREAMING = {"policy": "streaming", "budget": BUDGET}
SCHEDULE = Schedule(page_size=32, minimum=BUDGET)
PROMPT = [token % 250 + 3 for token in range(200)]


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[Any]:
    with engine(tiny, STREAMING, kv_cache_memory_bytes=16 << 20) as llm:
        yield llm
        assert_all_back(llm)


def num_free(llm: Any) -> int:
    return block_pool(llm).get_num_free_blocks()


def assert_all_back(llm: Any) -> None:
    """All pages but vLLM's null page are free, and nobody remembers a request."""
    assert num_free(llm) == block_pool(llm).num_gpu_blocks - 1
    assert all(block.ref_cnt == 0 for block in block_pool(llm).blocks if not block.is_null)
    assert not scheduler(llm).requests
    for manager in scheduler(llm).paged_managers:
        assert not manager.req_to_blocks
        assert not manager._sequences
        assert not manager.cached_pages.to_be_written
    assert not worker(llm).compactor._pending


def add(llm: Any, name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def drain(llm: Any) -> dict[str, Any]:
    """Steps until all is done; the finished outputs by request."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
    return finished


def test_free_pages_follow_the_schedule(llm):
    total = num_free(llm)
    add(llm, "a", PROMPT, 80)
    llm.llm_engine.step()
    assert total - num_free(llm) == cdiv(200, 32), "the prompt is held whole"
    for num_tokens in range(201, 279):
        llm.llm_engine.step()
        evicted = SCHEDULE.evicted(num_tokens - 1, 200)  # freed by this step
        assert total - num_free(llm) == cdiv(num_tokens, 32) - evicted // 32
    drain(llm)
    assert num_free(llm) == total
    assert_all_back(llm)


def test_waves_of_requests_leave_nothing_behind(llm):
    for wave in range(5):
        prompts = [PROMPT[: 7 + 13 * wave + 31 * index] for index in range(5)]
        assert [len(tokens) for tokens in generate(llm, prompts, 40 + wave)] == [40 + wave] * 5
        assert_all_back(llm)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 20])
def test_abort(llm, num_steps):
    alone = generate(llm, [PROMPT], 60)[0]
    scheduler(llm).reset_prefix_cache()
    add(llm, "kept", PROMPT, 60)
    add(llm, "aborted", [9, *PROMPT], 100)
    add(llm, "same", PROMPT, 100)
    for _ in range(num_steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["aborted", "same"])
    assert list(drain(llm)["kept"].outputs[0].token_ids) == alone
    assert_all_back(llm)


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(1, 1), (1, 120), (200, 1), (96, 1)])
def test_smallest_requests(llm, prompt_len, max_tokens):
    tokens = generate(llm, [PROMPT[:prompt_len]] * 2, max_tokens)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == max_tokens
    assert_all_back(llm)


def test_several_outputs_of_a_prompt(llm):
    from vllm import SamplingParams

    best = SamplingParams(n=2, top_k=1, max_tokens=100, ignore_eos=True)  # vLLM wants no greedy n
    sampled = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=100, ignore_eos=True)
    prompt = {"prompt_token_ids": PROMPT}
    results = [llm.generate([prompt], p, use_tqdm=False)[0].outputs for p in (best, sampled)]
    first, second = (list(output.token_ids) for output in results[0])
    assert first == second == generate(llm, [PROMPT], 100)[0]
    assert len({tuple(output.token_ids) for output in results[1]}) == 3
    again = llm.generate([prompt], sampled, use_tqdm=False)[0].outputs
    assert [o.token_ids for o in again] == [o.token_ids for o in results[1]]
    assert_all_back(llm)


def test_stop_string(llm):
    full = generate(llm, [PROMPT], 60)[0]
    stop = f"t{full[40]}"
    first = next(index for index, token in enumerate(full) if token == full[40])
    add(llm, "stops", PROMPT, 60, stop=[stop], include_stop_str_in_output=True)
    add(llm, "goes on", PROMPT, 60)
    done = drain(llm)
    assert done["stops"].outputs[0].finish_reason == "stop"
    assert list(done["stops"].outputs[0].token_ids) == full[: first + 1]
    assert list(done["goes on"].outputs[0].token_ids) == full
    assert_all_back(llm)


# What fits


@pytest.fixture(scope="module")
def small(tiny: str) -> Iterator[Any]:
    """Ten pages of use: 320 tokens."""
    with engine(tiny, STREAMING, num_gpu_blocks_override=11) as llm:
        yield llm


def test_pool_may_be_smaller_than_max_model_len(small):
    assert block_pool(small).num_gpu_blocks == 11
    assert len(generate(small, [PROMPT], 300)[0]) == 300, "more than the 320 tokens of the pool"
    assert num_free(small) == 10


def test_prompt_longer_than_the_pool_is_refused_and_others_go_on(small):
    from vllm.exceptions import VLLMValidationError

    add(small, "first", PROMPT, 50)
    with pytest.raises(VLLMValidationError, match=r"321 tokens, .* at most 320 \(10 pages"):
        add(small, "long", [5] * 321, 1)
    with pytest.raises(VLLMValidationError, match="compress_prefill"):
        small.generate([{"prompt_token_ids": [5] * 500}], use_tqdm=False)
    add(small, "just fits", [5] * 320, 50)
    assert {len(o.outputs[0].token_ids) for o in drain(small).values()} == {50}
    assert num_free(small) == 10


def test_resumable_requests_are_refused(small):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    processor = small.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match="resumable"):
        processor.process_inputs(
            "session", {"prompt_token_ids": [3, 4]}, SamplingParams(), ("generate",), resumable=True
        )
    assert not engine_core(small).scheduler.requests


def test_what_a_front_end_let_pass_ends_with_an_error(small, monkeypatch):
    """As where the engines have pools of different sizes: only this one knows its own."""
    monkeypatch.setattr(intake, "_pages_of_an_engine", lambda vllm_config: 1000)
    add(small, "long", [5] * 321, 1)
    (alone,) = drain(small).values()
    assert alone.outputs[0].finish_reason == "error"
    add(small, "first", PROMPT, 50)
    add(small, "long", [5] * 321, 1)
    outputs = drain(small)
    assert outputs["long"].outputs[0].finish_reason == "error"
    assert len(outputs["first"].outputs[0].token_ids) == 50
    assert num_free(small) == 10


@pytest.mark.parametrize(
    ("parallel", "pages"),
    [
        ({}, 120),
        ({"data_parallel_size": 3, "data_parallel_size_local": 3}, 40),
        ({"data_parallel_size": 3}, 40),  # on several machines, this front end sends to all
        # Whoever balances outside has one front end for each engine, or for those of a machine.
        ({"data_parallel_size": 3, "data_parallel_external_lb": True}, 120),
        ({"data_parallel_size": 6, "data_parallel_size_local": 3, "hybrid": True}, 40),
        ({"data_parallel_size": 3, "data_parallel_rank_local": 1}, 120),
    ],
)
def test_pages_of_one_engine(parallel, pages):
    """The sum of those that a process talks to, by their number."""
    from vllm.config import ParallelConfig

    config = ParallelConfig()
    config.data_parallel_rank_local = None  # vLLM sets it for a single engine, and offline
    parallel["data_parallel_hybrid_lb"] = parallel.pop("hybrid", False)
    for name, value in parallel.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    vllm_config = SimpleNamespace(
        parallel_config=config, cache_config=SimpleNamespace(num_gpu_blocks=120)
    )
    assert intake._pages_of_an_engine(vllm_config) == pages
    vllm_config.cache_config.num_gpu_blocks = None
    assert intake._pages_of_an_engine(vllm_config) is None


def test_request_longer_than_the_pool_with_compress_prefill(tiny):
    kv = {**STREAMING, "compress_prefill": True}
    settings = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 128}
    with engine(tiny, kv, **settings) as llm:
        prompts = [[token % 250 + 3 for token in range(n)] for n in (1500, 700, 40)]
        assert [len(tokens) for tokens in generate(llm, prompts, 300)] == [300] * 3
        assert_all_back(llm)


@pytest.mark.parametrize(
    ("settings", "chunk"),
    [
        ({}, 512),  # not vLLM's 2,048, of which a request would hold all
        ({"long_prefill_token_threshold": 96}, 96),
        ({"long_prefill_token_threshold": 1024}, 1024),
        ({"max_num_batched_tokens": 200}, 200),
    ],
)
def test_pieces_of_a_prompt_that_is_compressed_meanwhile(tiny, settings, chunk):
    """Also of a request that is alone, where vLLM would forget the threshold; it says so."""
    kv = {**STREAMING, "compress_prefill": True}
    settings = {"max_num_batched_tokens": 2048, "num_gpu_blocks_override": 100, **settings}
    with logged("vllm.scheduler.capacity") as lines, engine(tiny, kv, **settings) as llm:
        with recorded_chunks(llm) as chunks:
            generate(llm, [[token % 250 + 3 for token in range(1500)]], 4)
        (found,) = chunks.values()
        sizes = [end - start for start, end in found if end <= 1500]
        assert sizes == [chunk] * (1500 // chunk) + [1500 % chunk] * (1500 % chunk > 0)
        (manager,) = scheduler(llm).paged_managers
        pages = cdiv(BUDGET + 31 + chunk, 32)
        assert manager.peak_pages(2000, 1500) == pages
        assert_all_back(llm)
    assert f"in pieces of {chunk:,} tokens, meanwhile {99 / pages:.2f} sequences" in lines[0]
    assert "--long-prefill-token-threshold" in lines[0]


@pytest.mark.model
@pytest.mark.parametrize(("compress_prefill", "capacity"), [(True, 135_540), (False, 23_296)])
def test_reported_capacity(smollm2_dir, compress_prefill, capacity):
    """Plain vLLM reports 23,296 tokens."""
    kv = {"policy": "streaming", "budget": 128, "compress_prefill": compress_prefill}
    settings = {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 30}
    with (
        logged("vllm.scheduler.capacity") as lines,
        engine(str(smollm2_dir), kv, **settings) as llm,
    ):
        cache_config = llm.llm_engine.vllm_config.cache_config
        assert cache_config.kv_cache_size_tokens == capacity
    (line,) = lines
    # 728 pages in all, one of them vLLM's own; a sequence decodes in (128 + 32) / 32 = 5.
    assert "145.40 sequences of 4,096 tokens" in line
    assert "Longest prompt: any" in line
