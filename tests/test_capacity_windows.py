"""How many pages sliding windows hold: for prompts what vLLM admits, less while decoding."""

from __future__ import annotations

from collections import deque
from typing import Any

import engines
import pytest
import tiny_models
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from world_rules import Rules, make_scheduler

from paged_kv.capacity.cases import Case, Engine
from paged_kv.capacity.model import read_model
from paged_kv.capacity.pool import Pool
from paged_kv.config import CompressionConfig
from paged_kv.core.page_counts import window_pages
from paged_kv.core.schedule import cdiv

BUDGET = (8, 0, 1)


def pages_by_step(scheduler: Any, prompt_len: int, max_tokens: int, depth: int) -> list[int]:
    """Of the second group, in each step that is scheduled when the prompt is done.

    Args:
        scheduler: with nothing to do.
        prompt_len: tokens of the only request.
        max_tokens: that it generates.
        depth: steps in flight.
    """
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    params.update_from_generation_config({}, None)
    request = Request("r", [1] * prompt_len, params, None)
    scheduler.add_request(request)
    in_flight: deque[Any] = deque()
    held = []
    while scheduler.requests:
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            in_flight.append((output, request.num_computed_tokens >= prompt_len))
            if processed >= prompt_len:
                blocks = scheduler.kv_cache_manager.get_blocks("r").blocks[1]
                held.append(sum(not block.is_null for block in blocks))
        if len(in_flight) >= depth or not output.num_scheduled_tokens:
            done, samples = in_flight.popleft()
            sampled = [[1] if samples else []]
            scheduler.update_from_output(done, ModelRunnerOutput(["r"], {"r": 0}, sampled))
    return held


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("window", [1, 2, 8, 9, 10, 11, 12, 13, 47, 100])
def test_decoding_holds_the_window_and_the_steps_in_flight(window, asynchronous):
    rules = Rules(80, budgets=(BUDGET,), batch=24, caching=False, asynchronous=asynchronous)
    sizes: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    sliding = SlidingWindowSpec(block_size=rules.page_size, sliding_window=window, **sizes)
    scheduler = make_scheduler(rules, sliding)
    batches = 1 + asynchronous
    held = pages_by_step(scheduler, 30, rules.max_len, batches)
    expected = window_pages(window, rules.page_size, rules.max_len, batches)
    assert max(held) == expected
    assert len(held) > 4 * rules.page_size
    # The other group keeps 8 to 11 entries and the newest.
    assert scheduler.capacity.pages_per_sequence() == expected + 3
    assert scheduler.capacity.plain_pages([1]) == expected + cdiv(rules.max_len, rules.page_size)


@pytest.mark.vllm
@pytest.mark.parametrize("window", [64, 66])
def test_it_is_what_an_engine_holds(window, tmp_path, monkeypatch):
    """A prompt of several windows, then several more of them."""
    kind, architecture, sizes = tiny_models.MODELS["gemma3"]
    made = kind, architecture, {**sizes, "sliding_window": window}
    monkeypatch.setitem(tiny_models.MODELS, "gemma3-window", made)
    directory = tiny_models.saved("gemma3-window", tmp_path)
    prompt_len, page, options = 300, 32, {"policy": "streaming", "budget": 128}
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 256, "block_size": page}
    held: list[int] = []
    with engines.engine(directory, options, skip_tokenizer_init=True, **settings) as llm:
        scheduler = engines.scheduler(llm)
        (group,) = (
            index
            for index, each in enumerate(scheduler.kv_cache_config.kv_cache_groups)
            if isinstance(each.kv_cache_spec, SlidingWindowSpec)
        )
        schedule = scheduler.schedule

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            for name in output.num_scheduled_tokens:
                if scheduler.requests[name].num_computed_tokens > prompt_len:
                    blocks = scheduler.kv_cache_manager.get_blocks(name).blocks[group]
                    held.append(sum(not block.is_null for block in blocks))
            return output

        scheduler.schedule = recording
        engines.generate(llm, [[3 + index % 250 for index in range(prompt_len)]], 400)
        del scheduler.schedule
        reported = scheduler.capacity.pages_per_sequence()
    assert len(held) == 399
    assert max(held) == window_pages(window, page, 1024, 1) == (4 if window == 66 else 3)
    config = CompressionConfig.from_dict(options)
    pool = Pool(
        read_model(directory, "float32"),
        Engine(1 << 30, prompt_len, 1024, page, 16, 256),
        Case("streaming", "native", config),
    )
    assert reported == max(held) + 5 == pool.while_decoding().pages
    assert pool.while_prompting().pages == cdiv(300, page) + cdiv(300, page) + 1
