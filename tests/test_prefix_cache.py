"""Prefix caching in a running engine: hits happen, change nothing, and shared pages stay as are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import Tokens, block_pool, engine, recorded_chunks, scheduler
from reference_check import check_output
from reference_loop import Rule, Sequence_, load_model
from watched_pages import watched_pages

pytestmark = pytest.mark.vllm

STREAMING = {"policy": "streaming", "budget": 96}
PYRAMID = {"policy": "pyramidal+streaming", "budget": 128}
RULES = {
    "streaming": Rule([96] * 6),
    "pyramidal": Rule([160, 160, 128, 128, 96, 96]),
}
MAX_TOKENS = 64


def random_tokens(seed: int, count: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (count,), generator=generator).tolist()


LONG, SHORT = random_tokens(1, 230), random_tokens(2, 70)  # longer and shorter than the budgets

# name -> batches of prompts, one batch after the other
SCENARIOS: dict[str, list[list[Tokens]]] = {
    "long prefix": [[LONG + random_tokens(i, 20 + 15 * i)] for i in range(2)],
    "long prefix at once": [[LONG + random_tokens(i, 20 + 15 * i) for i in range(3)]],
    "short prefix": [[SHORT + random_tokens(i, 5 + 60 * i)] for i in range(2)],
    "short prefix at once": [[SHORT + random_tokens(i, 5 + 60 * i) for i in range(3)]],
    "same long prompt": [[LONG], [LONG]],
    "same long prompt at once": [[LONG] * 3],
    "same short prompt": [[SHORT], [SHORT]],
    "same short prompt at once": [[SHORT] * 3],
}


@pytest.fixture(scope="module")
def model(tiny: str) -> Any:
    return load_model(tiny)


@pytest.fixture(scope="module", params=["streaming", "pyramidal"])
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def uncached(tiny: str, policy: str) -> dict[str, list[list[Tokens]]]:
    """What the scenarios give without prefix caching."""
    kv = STREAMING if policy == "streaming" else PYRAMID
    with engine(tiny, kv, enable_prefix_caching=False, kv_cache_memory_bytes=32 << 20) as llm:
        return {
            name: [[tokens_of(output) for output in run(llm, batch)] for batch in batches]
            for name, batches in SCENARIOS.items()
        }


@pytest.fixture(scope="module")
def llm(tiny: str, policy: str, uncached: Any) -> Iterator[Any]:
    """After the engine of `uncached` has gone."""
    kv = STREAMING if policy == "streaming" else PYRAMID
    with engine(tiny, kv, enable_prefix_caching=True, kv_cache_memory_bytes=32 << 20) as llm:
        yield llm
        for manager in scheduler(llm).paged_managers:
            assert not manager.cached_pages.to_be_written
            assert not manager._sequences


def run(llm: Any, batch: list[Tokens], max_tokens: int = MAX_TOKENS) -> list[Any]:
    """vLLM's RequestOutput of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False)
    return outputs


def tokens_of(output: Any) -> Tokens:
    return list(output.outputs[0].token_ids)


def difference(model: Any, output: Any, chunks: Any, policy: str) -> str | None:
    """From the reference's tokens; their logprobs may be off by what float32 makes of them."""
    prompt = output.prompt_token_ids
    sequence = Sequence_(model, RULES[policy], len(prompt))
    return check_output(sequence, prompt, output.outputs[0], chunks, tolerance=1e-3)


def never_written(policy: str, prompt_len: int) -> int:
    """Tokens of a prompt whose pages no compaction writes, in any group."""
    budget = 96 if policy == "streaming" else 160
    return max(32, (prompt_len - budget) // 32 * 32)


@pytest.mark.parametrize("name", SCENARIOS)
def test_hits_change_nothing(llm, uncached, policy, model, name):
    scheduler(llm).reset_prefix_cache()
    hits = []
    for batch, expected in zip(SCENARIOS[name], uncached[name], strict=True):
        with recorded_chunks(llm) as chunks, watched_pages(llm) as watch:
            outputs = run(llm, batch)
        assert [tokens_of(output) for output in outputs] == expected
        for output, own in zip(outputs, chunks.values(), strict=True):
            assert not difference(model, output, own, policy)
        hits += [output.num_cached_tokens for output in outputs]
        assert watch.num_events >= len(batch)
        assert watch.num_compared > 0
    prefix = len(LONG) if "long" in name else len(SHORT)
    assert hits[0] == 0
    # In one step, a request shares only what neither will rewrite; later, all whole pages.
    expected_hit = prefix // 32 * 32
    if "at once" in name:
        expected_hit = min(expected_hit, never_written(policy, prefix))
    assert all(hit >= expected_hit for hit in hits[1:])


def test_short_prompt_is_hit_up_to_its_last_page_while_raw(llm):
    scheduler(llm).reset_prefix_cache()
    prompt = random_tokens(7, 65)
    (first,) = run(llm, [prompt], 4)  # never evicts: all of its pages stay raw
    with watched_pages(llm) as watch:
        outputs = run(llm, [prompt, prompt, [*prompt, 9]])
    assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]
    assert tokens_of(outputs[0]) == tokens_of(outputs[1])
    assert tokens_of(outputs[0])[:4] == tokens_of(first)
    assert watch.num_copies > 0, "those that evict have copies of what they rewrite"


def test_hit_on_pages_whose_owner_will_compact(llm):
    """Both decode together; each rewrites pages that the other has in common with it."""
    from vllm import SamplingParams

    prompt = random_tokens(7, 65)
    scheduler(llm).reset_prefix_cache()
    (alone,) = run(llm, [prompt])
    scheduler(llm).reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = {}
    with watched_pages(llm) as watch:
        for name in ("owner", "hitter"):
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
            for _ in range(4):
                llm.llm_engine.step()
        while llm.llm_engine.has_unfinished_requests():
            outputs.update({output.request_id: output for output in llm.llm_engine.step()})
    hits = {name: output.num_cached_tokens for name, output in outputs.items()}
    assert hits == {"owner": 0, "hitter": 64}
    assert tokens_of(outputs["owner"]) == tokens_of(outputs["hitter"]) == tokens_of(alone)
    assert watch.num_copies > 0


def test_multi_turn(llm, model, policy):
    """Each prompt is the one before it, with its output and something new."""
    scheduler(llm).reset_prefix_cache()
    prompt, hits = random_tokens(8, 40), []
    for turn in range(4):
        with recorded_chunks(llm) as chunks, watched_pages(llm):
            (output,) = run(llm, [prompt], 45)
        (own,) = chunks.values()
        assert not difference(model, output, own, policy)
        hits.append(output.num_cached_tokens)
        prompt = [*prompt, *tokens_of(output), *random_tokens(20 + turn, 10)]
    assert hits[:2] == [0, 64]  # 84 tokens were computed: two whole pages
    assert all(hit >= 64 for hit in hits[2:])


def test_vllm_counts_the_hits(llm):
    scheduler(llm).reset_prefix_cache()
    run(llm, [LONG], 1)
    manager = scheduler(llm).kv_cache_manager
    counted = []
    record = manager.record_prefix_cache_stats

    def recording(request: Any, num_hits: int) -> None:
        counted.append((request.num_tokens, num_hits))
        record(request, num_hits)

    manager.record_prefix_cache_stats = recording
    try:
        (output,) = run(llm, [LONG], 1)
    finally:
        del manager.record_prefix_cache_stats
    assert counted == [(len(LONG), output.num_cached_tokens)]
    assert output.num_cached_tokens >= 64


def test_freed_cached_pages_count_as_free(llm):
    pool = block_pool(llm)
    run(llm, [LONG, SHORT], 1)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert len(pool.cached_block_hash_to_block) > 0
