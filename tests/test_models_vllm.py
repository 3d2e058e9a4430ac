"""Real generations with tiny random models of each supported kind."""

from __future__ import annotations

import random
from typing import Any

import engines
import pytest
import tiny_models

SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
}
BUDGET = 128
NUM_LAYERS = 6
LONG, SHORT = (200, 100), (40, 40)  # tokens of a prompt, tokens to generate


def generate(llm: Any, lengths: tuple[int, int]) -> engines.Tokens:
    prompt_len, max_tokens = lengths
    rng = random.Random(prompt_len)
    prompt = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(prompt_len)]
    return engines.generate(llm, [prompt], max_tokens)[0]


def generate_and_count(llm: Any, lengths: tuple[int, int]) -> tuple[engines.Tokens, list[int]]:
    """Its tokens, and the pages of each group in the last step."""
    held: list[int] = []
    scheduler = engines.scheduler(llm)
    schedule = scheduler.schedule

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for request_id in output.num_scheduled_tokens:
            held[:] = [
                sum(not block.is_null for block in blocks)
                for blocks in scheduler.kv_cache_manager.get_blocks(request_id).blocks
            ]
        return output

    scheduler.schedule = recording
    try:
        return generate(llm, lengths), held
    finally:
        del scheduler.schedule


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_models(tmp_path, name):
    """As without a policy while the budget holds everything; fewer pages when it does not."""
    model = tiny_models.saved(name, tmp_path)
    with engines.engine(model, **SETTINGS) as llm:
        expected = generate(llm, SHORT)
        long_expected, stock_pages = generate_and_count(llm, LONG)
    with engines.engine(model, {"policy": "streaming", "budget": BUDGET}, **SETTINGS) as llm:
        assert generate(llm, SHORT) == expected
        assert engines.worker(llm).compactor.num_events == 0
        tokens, pages = generate_and_count(llm, LONG)
        assert tokens != long_expected
        assert engines.worker(llm).compactor.num_events > 0
        layers = layer_specs(llm)

    assert len(set(expected)) > 10, "the model repeats itself: a difference would not show"
    assert len(pages) == len(stock_pages)
    is_full = [layer % 2 == 1 or name != "gemma3" for layer in range(NUM_LAYERS)]
    assert [spec for spec, _ in layers] == [
        "PagedSpec" if full else "SlidingWindowSpec" for full in is_full
    ]
    assert [backend.startswith(("PagedKV", "Packed")) for _, backend in layers] == is_full
    assert len(pages) == (2 if name == "gemma3" else 1)
    # 299 tokens are in the cache: 10 pages; a budget of 128 keeps 128 to 159, in 5.
    assert max(stock_pages) == 10
    assert max(pages) == 5


def layer_specs(llm: Any) -> list[tuple[str, str]]:
    """(KV cache spec, attention backend) of every layer."""
    worker = engines.worker(llm)
    specs = {
        name: type(group.kv_cache_spec).__name__
        for group in engines.scheduler(llm).kv_cache_config.kv_cache_groups
        for name in group.layer_names
    }
    context = worker.vllm_config.compilation_config.static_forward_context
    return [
        (specs[name], context[name].attn_backend.__name__)
        for name in (f"model.layers.{layer}.self_attn.attn" for layer in range(NUM_LAYERS))
    ]


@pytest.mark.vllm
def test_a_pyramid_on_a_hybrid_has_one_tier(tmp_path):
    model = tiny_models.saved("gemma3", tmp_path)
    policy = {"policy": "pyramidal+streaming", "budget": BUDGET}
    with engines.engine(model, policy, **SETTINGS) as llm:
        assert len(generate_and_count(llm, LONG)[1]) == 2
        assert [spec for spec, _ in layer_specs(llm)].count("PagedSpec") == 3


@pytest.mark.vllm
def test_a_pyramid_has_a_group_for_each_tier(tmp_path):
    model = tiny_models.saved("llama", tmp_path)
    policy = {"policy": "pyramidal+streaming", "budget": BUDGET}
    with engines.engine(model, policy, **SETTINGS) as llm:
        pages = generate_and_count(llm, LONG)[1]
    assert len(pages) == 3
    assert pages == sorted(pages, reverse=True)
    assert pages[0] > pages[2]
