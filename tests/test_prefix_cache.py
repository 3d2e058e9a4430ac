"""Prefix caching in a running engine: hits happen, change nothing, and shared pages stay as are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import reference_loop
import tiny_models
import torch
from engines import Tokens, block_pool, engine, engine_core, recorded_chunks, scheduler, worker

pytestmark = pytest.mark.vllm

STREAMING = {"policy": "streaming", "budget": 96}
PYRAMID = {"policy": "pyramidal", "budget": 128}
RULES = {
    "streaming": reference_loop.Rule([96] * 6),
    "pyramidal": reference_loop.Rule([160, 160, 128, 128, 96, 96]),
}
MAX_TOKENS = 100


def tokens_of(seed: int, count: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (count,), generator=generator).tolist()


LONG, SHORT = tokens_of(1, 230), tokens_of(2, 70)  # longer and shorter than the budgets

# name -> batches of prompts, one batch after the other
SCENARIOS: dict[str, list[list[Tokens]]] = {
    "long prefix": [[LONG + tokens_of(i, 20 + 15 * i)] for i in range(3)],
    "long prefix at once": [[LONG + tokens_of(i, 20 + 15 * i) for i in range(3)]],
    "short prefix": [[SHORT + tokens_of(i, 5 + 60 * i)] for i in range(3)],
    "short prefix at once": [[SHORT + tokens_of(i, 5 + 60 * i) for i in range(3)]],
    "same long prompt": [[LONG], [LONG], [LONG]],
    "same long prompt at once": [[LONG] * 3],
    "same short prompt": [[SHORT], [SHORT]],
    "same short prompt at once": [[SHORT] * 3],
}


@dataclass
class Watch:
    """What a PageWatch saw."""

    num_compared: int = 0
    num_copies: int = 0
    num_events: int = 0


@contextmanager
def watched_pages(llm: Any) -> Iterator[Watch]:
    """Compares, around every step, the contents of all pages that are cached or shared."""
    watch = Watch()
    target, executor, pool = scheduler(llm), engine_core(llm).model_executor, block_pool(llm)
    caches = [layer.kv_cache for layer in worker(llm).compactor.layers.values()]
    schedule, execute = target.schedule, executor.execute_model
    before: dict[int, Any] = {}

    def protected() -> dict[int, Any]:
        blocks = [b for b in pool.blocks if b.block_hash is not None or b.ref_cnt > 1]
        return {b.block_id: b.block_hash for b in blocks if not b.is_null}

    def watching_schedule(*args: Any, **kwargs: Any) -> Any:
        before.clear()
        before.update(protected())
        output = schedule(*args, **kwargs)
        watch.num_copies += len(output.kv_cache_block_copies or ())
        return output

    def watching_execute(*args: Any, **kwargs: Any) -> Any:
        now = protected()
        pages = [p for p, block_hash in before.items() if p in now and now[p] == block_hash]
        snapshots = [cache[pages] for cache in caches]
        num_events = worker(llm).compactor.num_events
        result = execute(*args, **kwargs)
        for cache, snapshot in zip(caches, snapshots, strict=True):
            assert torch.equal(cache[pages], snapshot), "a cached or shared page was written"
        watch.num_compared += len(pages)
        watch.num_events += worker(llm).compactor.num_events - num_events
        return result

    target.schedule, executor.execute_model = watching_schedule, watching_execute
    try:
        yield watch
    finally:
        del target.schedule, executor.execute_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.saved("llama", tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture(scope="module")
def model(tiny: str) -> Any:
    return reference_loop.load_model(tiny)


@pytest.fixture(scope="module", params=["streaming", "pyramidal"])
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def uncached(tiny: str, policy: str) -> dict[str, list[list[Tokens]]]:
    """What the scenarios give without prefix caching."""
    kv = STREAMING if policy == "streaming" else PYRAMID
    with engine(tiny, kv, enable_prefix_caching=False, kv_cache_memory_bytes=32 << 20) as llm:
        return {
            name: [[tokens for tokens, _ in run(llm, batch)] for batch in batches]
            for name, batches in SCENARIOS.items()
        }


@pytest.fixture(scope="module")
def llm(tiny: str, policy: str, uncached: Any) -> Iterator[Any]:
    """After the engine of `uncached` has gone."""
    kv = STREAMING if policy == "streaming" else PYRAMID
    with engine(tiny, kv, enable_prefix_caching=True, kv_cache_memory_bytes=32 << 20) as llm:
        yield llm
        for manager in scheduler(llm).paged_managers:
            assert not manager._to_be_written


def run(llm: Any, batch: list[Tokens], max_tokens: int = MAX_TOKENS) -> list[tuple[Tokens, int]]:
    """(tokens, prompt tokens that were a hit) of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs]


def never_written(policy: str, prompt_len: int) -> int:
    """Tokens of a prompt whose pages no compaction writes, in any group."""
    budget = 96 if policy == "streaming" else 160
    return max(32, (prompt_len - budget) // 32 * 32)


@pytest.mark.parametrize("name", SCENARIOS)
def test_hits_change_nothing(llm, uncached, policy, model, name):
    scheduler(llm).reset_prefix_cache()
    hits = []
    for batch, expected in zip(SCENARIOS[name], uncached[name], strict=True):
        with watched_pages(llm) as watch, recorded_chunks(llm) as chunks:
            results = run(llm, batch)
        assert [tokens for tokens, _ in results] == expected
        for prompt, (tokens, _), own in zip(batch, results, chunks.values(), strict=True):
            assert not reference_loop.check_tokens(model, prompt, tokens, own, RULES[policy])
        hits += [hit for _, hit in results]
        assert watch.num_events >= len(batch)
        assert watch.num_compared > 0
    prefix = len(LONG) if "long" in name else len(SHORT)
    assert hits[0] == 0
    shared = prefix if "same" in name else prefix // 32 * 32
    assert all(hit >= min(shared, never_written(policy, prefix)) for hit in hits[1:])


def test_prompt_below_the_budget_is_hit_up_to_its_last_page_while_raw(llm):
    """By requests that evict and by one that does not, while its owner is still there."""
    from vllm import SamplingParams

    scheduler(llm).reset_prefix_cache()
    prompt = tokens_of(7, 65)
    ((first, _),) = run(llm, [prompt], 4)  # never evicts: all of its pages stay raw
    with watched_pages(llm) as watch:
        results = run(llm, [prompt, prompt, [*prompt, 9]])
    assert [hit for _, hit in results] == [64, 64, 64]
    assert all(tokens[:4] == first for tokens, _ in results[:2])
    assert watch.num_copies > 0, "those that evict have copies of what they rewrite"
    scheduler(llm).reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    hits = {}
    with watched_pages(llm) as watch:
        for name in ("owner", "hitter"):
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
            for _ in range(4):
                llm.llm_engine.step()
        outputs = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                hits[output.request_id] = output.num_cached_tokens
                outputs[output.request_id] = list(output.outputs[0].token_ids)
    assert hits == {"owner": 0, "hitter": 64}
    assert outputs["owner"] == outputs["hitter"] == results[0][0]
    assert watch.num_copies > 0


def test_multi_turn(llm, model, policy):
    """Each prompt is the one before it, with its output and something new."""
    scheduler(llm).reset_prefix_cache()
    prompt, hits = tokens_of(8, 40), []
    for turn in range(4):
        with watched_pages(llm), recorded_chunks(llm) as chunks:
            ((tokens, hit),) = run(llm, [prompt], 45)
        (own,) = chunks.values()
        assert not reference_loop.check_tokens(model, prompt, tokens, own, RULES[policy])
        hits.append(hit)
        prompt = [*prompt, *tokens, *tokens_of(20 + turn, 10)]
    # 84 tokens were computed: 64 of them fill pages.
    assert hits[:2] == [0, 64]
    assert hits[2:] >= [64, 64]


def test_hits_are_counted(llm):
    scheduler(llm).reset_prefix_cache()
    run(llm, [LONG], 1)
    manager = scheduler(llm).kv_cache_manager
    queries, hits = [], []
    record = manager.record_prefix_cache_stats

    def recording(request: Any, num_hits: int) -> None:
        queries.append(request.num_tokens)
        hits.append(num_hits)
        record(request, num_hits)

    manager.record_prefix_cache_stats = recording
    try:
        ((_, hit),) = run(llm, [LONG], 1)
    finally:
        del manager.record_prefix_cache_stats
    assert queries == [len(LONG)]
    assert hits == [hit]
    assert hit >= 64


def test_freed_cached_pages_count_as_free(llm):
    pool = block_pool(llm)
    run(llm, [LONG, SHORT])
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert len(pool.cached_block_hash_to_block) > 0
