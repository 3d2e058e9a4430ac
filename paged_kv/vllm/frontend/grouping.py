"""How vLLM groups the layers, and which budgets are refused for it.

vLLM makes a KV cache group of every distinct budget. All groups draw pages of one size from one
pool, so a group must have (about) as many layers as the others, and each group costs scheduling
time: a pyramid with a budget of its own for every layer would be the slowest of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from paged_kv.config import CompressionConfig
from paged_kv.core import budgets
from paged_kv.core.schedule import cdiv
from paged_kv.plan import Budget, Plan, step_budgets
from paged_kv.vllm.plan import GroupedPlan

_MOST_NAMED = 12  # splits in a refusal


def group_size(bucket_sizes: Sequence[int]) -> int:
    """Layers in each KV cache group that vLLM makes of buckets of layers with equal specs.

    Its rule: the smallest bucket, or the largest if that is less than 1.5 times the smallest
    (vllm/v1/core/kv_cache_utils.py, _get_kv_cache_groups_uniform_page_size).
    """
    smallest, largest = min(bucket_sizes), max(bucket_sizes)
    return largest if largest < 1.5 * smallest else smallest


def num_groups(bucket_sizes: Sequence[int]) -> list[int]:
    """KV cache groups that each bucket becomes."""
    return [cdiv(size, group_size(bucket_sizes)) for size in bucket_sizes]


def group_layers(plan: Plan, config: CompressionConfig, num_sliding: int) -> GroupedPlan:
    """The plan with the groups that vLLM will make of its layers.

    Args:
        plan: budgets by layer.
        config: the options that it was made from.
        num_sliding: layers of the model without full attention, which are left as they are.

    Raises:
        ValueError: there would be more groups than max_groups; names splits that work.
    """
    compressed = _bucket_sizes(plan.budgets.values())
    num_skipped = len(config.skip_layers)
    buckets = _without_empty([*compressed, num_skipped, num_sliding])
    groups = num_groups(buckets)
    if sum(groups) > config.max_groups:
        num_full = sum(compressed) + num_skipped
        raise ValueError(
            f"these options need {sum(groups)} KV cache groups, more than max_groups "
            f"{config.max_groups}: vLLM makes groups as small as the smallest set of layers with "
            f"equal budgets, and the sets have {buckets} layers. "
            f"{_working_splits(config, plan.page_size, num_full, num_sliding)}"
        )
    return GroupedPlan(
        **vars(plan),
        num_groups=sum(groups[: len(compressed)]),
        num_other_groups=sum(groups[len(compressed) :]),
        layers_per_page=group_size(buckets),
    )


def _bucket_sizes(by_layer: Iterable[Budget]) -> list[int]:
    """Layers of each distinct budget: steps can come to the same."""
    return list(Counter(by_layer).values())


def _without_empty(buckets: Sequence[int]) -> list[int]:
    return [size for size in buckets if size]


def _working_splits(
    config: CompressionConfig, page_size: int, num_full: int, num_sliding: int
) -> str:
    """Names (skipped layers, steps) that stay within max_groups."""
    works = []
    most_steps = config.max_groups if config.is_pyramid and not num_sliding else 1
    for skipped in range(num_full):
        for num_steps in range(1, min(most_steps, num_full - skipped) + 1):
            sizes = budgets.step_sizes(num_full - skipped, num_steps)
            try:
                steps = step_budgets(config, page_size, sizes)
            except ValueError:  # too small for the last step
                continue
            by_layer = [step for step, size in zip(steps, sizes, strict=True) for _ in range(size)]
            buckets = _without_empty([*_bucket_sizes(by_layer), skipped, num_sliding])
            if sum(num_groups(buckets)) <= config.max_groups:
                works.append((skipped, num_steps))
    if not works:
        return "No split of this model works; raise max_groups"
    named = (f"{skipped} skipped with pyramid_steps {num}" for skipped, num in works[:_MOST_NAMED])
    return f"Splits that work: {', '.join(named)}"
