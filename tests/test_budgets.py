from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import engines
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.core.budgets import (
    pyramid,
    step_fractions,
    step_pages,
    step_sizes,
)
from paged_kv.core.schedule import MAX_DENOMINATOR, Schedule
from paged_kv.vllm.frontend.grouping import group_size, num_groups

BETAS = st.fractions(1, 50, max_denominator=100)
SHAPES = st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 9))))


def mean(values: list[Fraction], sizes: list[int]) -> Fraction:
    return sum((v * n for v, n in zip(values, sizes, strict=True)), Fraction()) / sum(sizes)


@pytest.mark.parametrize(
    ("num_layers", "num_steps", "expected"),
    [
        (30, 3, [10, 10, 10]),
        (32, 3, [11, 11, 10]),
        (28, 5, [6, 6, 6, 5, 5]),
        (4, 4, [1, 1, 1, 1]),
        (7, 1, [7]),
    ],
)
def test_step_sizes(num_layers, num_steps, expected):
    assert step_sizes(num_layers, num_steps) == expected


# ---- the pyramid


@given(SHAPES, BETAS)
def test_pyramid_is_the_formula(shape, beta):
    """L_k = L_0 (1 + (k / m) (1 / beta - 1)), evaluated in floats for a mean of 1."""
    num_layers, num_steps = shape
    layers = [1 + k / num_layers * (1 / float(beta) - 1) for k in range(num_layers)]
    first = num_layers / sum(layers)  # L_0
    start = 0
    weights = pyramid(num_layers, num_steps, beta)
    for weight, size in zip(weights, step_sizes(num_layers, num_steps), strict=True):
        of_tier = [first * layer for layer in layers[start : start + size]]
        assert float(weight) == pytest.approx(sum(of_tier) / size)
        start += size


def test_pyramid_by_hand():
    """4 layers, beta 2: 1, 7/8, 6/8, 5/8 with mean 13/16; two steps of 15/16 and 11/16."""
    assert pyramid(4, 2, Fraction(2)) == [Fraction(15, 13), Fraction(11, 13)]


@given(SHAPES, BETAS)
def test_pyramid_has_mean_one_and_falls(shape, beta):
    weights = pyramid(*shape, beta)
    assert mean(weights, step_sizes(*shape)) == 1
    assert all(a > b if beta > 1 else a == b for a, b in pairwise(weights))


@given(SHAPES)
def test_beta_one_is_uniform(shape):
    assert pyramid(*shape, Fraction(1)) == [1] * shape[1]


def test_last_layer_against_first():
    """beta is the first layer's budget over that of a layer past the last one."""
    weights = pyramid(100, 100, Fraction(4))
    assert weights[99] / weights[0] == 1 - Fraction(99, 100) * Fraction(3, 4)


# ---- whole pages


@given(SHAPES, BETAS, st.integers(1, 4096))
def test_step_pages_keep_the_mean(shape, beta, budget):
    sizes, weights = step_sizes(*shape), pyramid(*shape, beta)
    budget_pages = Fraction(budget, 32)
    pages = step_pages(weights, sizes, budget_pages)
    for count, weight in zip(pages, weights, strict=True):
        assert abs(count - weight * budget_pages) < 1
    total = sum(count * size for count, size in zip(pages, sizes, strict=True))
    wanted = budget_pages * sum(sizes)
    assert total <= wanted
    # What is left is not enough for one more page in a step that was rounded down.
    cut = [n for n, c, w in zip(sizes, pages, weights, strict=True) if c < w * budget_pages]
    assert not cut or wanted - total < max(cut)


@given(st.integers(1, 20), st.integers(1, 6), BETAS, st.integers(1, 64))
def test_even_tiers_have_the_mean_exactly(size, num_steps, beta, budget_pages):
    weights = pyramid(size * num_steps, num_steps, beta)
    pages = step_pages(weights, [size] * num_steps, Fraction(budget_pages))
    assert sum(pages) == budget_pages * num_steps
    assert pages == sorted(pages, reverse=True)


def test_step_pages_by_hand():
    """30 layers, beta 2: 9.76, 8 and 6.24 pages; the step that lost most gets the one left."""
    assert step_pages(pyramid(30, 3, Fraction(2)), [10] * 3, Fraction(8)) == [10, 8, 6]


# ---- fractions


@given(SHAPES, BETAS, st.fractions(Fraction(1, 100), Fraction(99, 100), max_denominator=100))
def test_step_fractions_keep_the_mean(shape, beta, fraction):
    sizes, weights = step_sizes(*shape), pyramid(*shape, beta)
    least = Fraction(1, MAX_DENOMINATOR)
    fractions = step_fractions(weights, sizes, fraction)
    assert all(0 < value <= 1 for value in fractions)
    assert all(value.denominator <= MAX_DENOMINATOR for value in fractions)
    assert abs(mean(fractions, sizes) - fraction) <= least
    # Those that are not full stand to each other as their weights do.
    rest = [(v, w) for v, w in zip(fractions, weights, strict=True) if v < 1]
    for (value, weight), (other, other_weight) in pairwise(rest):
        assert abs(value * other_weight - other * weight) <= least * (weight + other_weight)


def test_saturated_steps_pass_the_rest_on():
    weights = [Fraction(2), Fraction(3, 4), Fraction(1, 4)]
    assert step_fractions(weights, [1, 1, 1], Fraction(1, 4)) == [w / 4 for w in weights]
    # 0.8 times 2 is more than everything: 1, and 1.4 is left for 3/4 and 1/4. That saturates the
    # second one too.
    expected = [Fraction(1), Fraction(1), Fraction(2, 5)]
    assert step_fractions(weights, [1, 1, 1], Fraction(4, 5)) == expected


# ---- vLLM's groups


def vllm_groups(bucket_sizes: list[int]) -> list[int]:
    """Groups that vLLM makes of each bucket of layers with equal specs; bucket 0 keeps all."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

    from paged_kv.vllm.scheduler.spec import PagedSpec

    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    specs = {}
    for bucket, size in enumerate(bucket_sizes):
        spec = PagedSpec.from_full(full, Schedule(32, 96 + 32 * bucket)) if bucket else full
        specs.update({f"layer.{bucket}.{index}": spec for index in range(size)})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        attention_config=None,
        speculative_config=None,
    )
    groups = engines.kv_cache_planning().get_kv_cache_groups(config, specs)
    found = [0] * len(bucket_sizes)
    for group in groups:
        (bucket,) = {int(name.split(".")[1]) for name in group.layer_names}
        found[bucket] += 1
    return found


@pytest.mark.parametrize(
    "bucket_sizes",
    [
        [30],
        [10, 10, 10],
        [11, 11, 10],
        [8, 8, 8, 6],
        [14, 14, 2],
        [29, 1],
        [6, 9],
        [6, 8],
        [2, 3, 4],
    ],
    ids=str,
)
def test_num_groups_is_what_vllm_makes(bucket_sizes):
    assert num_groups(bucket_sizes) == vllm_groups(bucket_sizes)


@settings(deadline=None)  # the first example may import vLLM
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_num_groups_is_what_vllm_makes_of_anything(bucket_sizes):
    groups = num_groups(bucket_sizes)
    assert groups == vllm_groups(bucket_sizes)
    size = group_size(bucket_sizes)
    assert all((n - 1) * size < b <= n * size for n, b in zip(groups, bucket_sizes, strict=True))
