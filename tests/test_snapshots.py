"""Raw pages stay in the prefix cache when their owner rewrites them."""

from __future__ import annotations

import random
from typing import Any

import engines
import pytest
import tiny_models

PAGE = 4
GROUP = 0


def _world(num_pages: int = 12) -> tuple[Any, Any]:
    from vllm.v1.core.block_pool import BlockPool

    from paged_kv.vllm.scheduler.snapshots import Snapshots

    pool = BlockPool(num_pages, enable_caching=True, hash_block_size=PAGE)
    return pool, Snapshots(pool, GROUP, PAGE)


def _hashes(count: int) -> list[Any]:
    from vllm.v1.core.kv_cache_utils import BlockHash

    return [BlockHash(bytes([index]) * 32) for index in range(count)]


def test_copy_is_hit_once_the_step_is_done_and_costs_no_page() -> None:
    pool, snapshots = _world()
    blocks = pool.get_new_blocks(4)
    snapshots.take("a", blocks, _hashes(4), first=1, reserve=0)
    copies = snapshots.drain()
    assert [copy.src_block_id for copy in copies] == [block.block_id for block in blocks[1:]]
    assert pool.get_cached_block(_hashes(4)[1], [GROUP]) is None, "not computed yet"
    assert pool.get_num_free_blocks() == 11 - 4 - 3
    snapshots.publish()
    hits = [pool.get_cached_block(h, [GROUP]) for h in _hashes(4)]
    assert hits[0] is None
    assert [hit[0].block_id for hit in hits[1:]] == [copy.dst_block_id for copy in copies]
    assert pool.get_num_free_blocks() == 11 - 4
    assert snapshots.drain() == []


def test_what_is_cached_is_not_copied_again() -> None:
    pool, snapshots = _world()
    snapshots.take("a", pool.get_new_blocks(3), _hashes(3), first=1, reserve=0)
    snapshots.drain()
    snapshots.publish()
    snapshots.take("b", pool.get_new_blocks(3), _hashes(3), first=1, reserve=0)
    assert snapshots.drain() == []


@pytest.mark.parametrize(("reserve", "copied"), [(0, 3), (5, 2), (7, 0), (99, 0)])
def test_reserve_stays_free(reserve: int, copied: int) -> None:
    pool, snapshots = _world()
    snapshots.take("a", pool.get_new_blocks(4), _hashes(4), first=1, reserve=reserve)
    assert len(snapshots.drain()) == copied


def test_copies_of_a_request_that_lost_its_pages_are_dropped() -> None:
    pool, snapshots = _world()
    snapshots.take("a", pool.get_new_blocks(2), _hashes(2), first=1, reserve=0)
    snapshots.take("b", pool.get_new_blocks(3), _hashes(3), first=2, reserve=0)
    snapshots.cancel("a")
    assert len(snapshots.drain()) == 1
    snapshots.publish()
    assert pool.get_cached_block(_hashes(3)[1], [GROUP]) is None
    assert pool.get_num_free_blocks() == 11 - 5


@pytest.mark.vllm
def test_the_same_prompt_again_is_hit_whole(tiny: str) -> None:
    """Also a shorter and a longer one that share its beginning; tokens as without caching."""
    from vllm import SamplingParams

    rng = random.Random(0)
    first = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(700)]
    shorter = first[:200] + [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(300)]
    waves = [[first], [first], [shorter], [shorter], [first, shorter, [*first, *range(50, 150)]]]
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    tokens: dict[bool, list[list[int]]] = {}
    hits: list[int] = []
    for caching in (False, True):
        policy = {"policy": "pyramidal+streaming", "budget": 256}
        with engines.engine(tiny, policy, enable_prefix_caching=caching) as llm:
            outputs = [
                output
                for wave in waves
                for output in llm.generate(
                    [{"prompt_token_ids": prompt} for prompt in wave], params, use_tqdm=False
                )
            ]
            tokens[caching] = [list(output.outputs[0].token_ids) for output in outputs]
            hits = [output.num_cached_tokens for output in outputs]
            pool = engines.block_pool(llm)
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            assert llm.reset_prefix_cache()
    assert hits == [0, 672, 192, 480, 672, 480, 672]
    assert tokens[True] == tokens[False]
