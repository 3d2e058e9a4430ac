"""The plan: which layer keeps how much, and the groups that vLLM makes of it, or refuses."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.config import CompressionConfig
from paged_kv.core.budgets import step_sizes
from paged_kv.plan import make_plan
from paged_kv.vllm.frontend.grouping import group_layers, num_groups
from paged_kv.vllm.plan import GroupedPlan


def config(**values) -> CompressionConfig:
    return CompressionConfig.from_dict({"policy": "streaming", **values})


def grouped_plan(values: dict, num_layers: int = 30, full: list[int] | None = None) -> GroupedPlan:
    """As vLLM has it."""
    full = list(range(num_layers)) if full is None else full
    config = CompressionConfig.from_dict(values)
    return group_layers(make_plan(config, 32, num_layers, full), config, num_layers - len(full))


def test_uniform_plan():
    plan = grouped_plan({"policy": "streaming", "budget": 200, "skip_layers": [0, 1, 2, 29]}, 30)
    assert plan.budgets == {layer: (200, 0, 1) for layer in range(3, 29)}
    assert (plan.num_groups, plan.num_other_groups, plan.layers_per_page) == (7, 1, 4)
    assert plan.schedule(0) is None
    assert plan.schedule(3).budget(10_000) == 200


def test_pyramid_plan():
    plan = grouped_plan({"policy": "pyramidal", "budget": 256})
    steps = [(320, 0, 1)] * 10 + [(256, 0, 1)] * 10 + [(192, 0, 1)] * 10
    assert plan.budgets == dict(enumerate(steps))
    assert (plan.num_groups, plan.num_other_groups, plan.layers_per_page) == (3, 0, 10)
    assert plan.describe() == (
        "layers 0-9: 320 entries; layers 10-19: 256 entries; layers 20-29: 192 entries"
    )


def test_pyramid_plan_of_a_fraction():
    values = {"policy": "pyramidal", "budget": 0.5, "min_budget": 96, "compress_prefill": True}
    plan = grouped_plan(values)
    kept = [plan.schedule(layer).budget(91_000) for layer in (0, 10, 20)]
    assert kept == [55_500, 45_500, 35_500]  # 111, 91 and 71 of 182: the pyramid of beta 2
    assert plan.schedule(29).budget(100) == 96
    assert plan.compress_prefill


def test_hybrids_get_one_step():
    plan = grouped_plan({"policy": "pyramidal", "budget": 256}, 12, [5, 11])
    assert plan.budgets == {5: (256, 0, 1), 11: (256, 0, 1)}
    assert (plan.num_groups, plan.num_other_groups, plan.layers_per_page) == (1, 5, 2)


def test_plan_round_trip():
    plan = grouped_plan({"policy": "pyramidal", "budget": 0.3, "skip_layers": list(range(6))})
    assert GroupedPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip_layers": [3, 30, 40]}, r"skip_layers names \[30, 40\], but the layers .* 29\]"),
        ({"skip_layers": list(range(30))}, r"skip_layers .* leaves no layer to compress"),
        ({"budget": 60}, r"budget 60 is too small: it must be at least 68"),
        (
            {"policy": "pyramidal", "budget": 96, "pyramid_beta": 8},
            r"budget 96 with pyramid_beta 8.0 and 3 pyramid_steps leaves the last layers 32 "
            r"entries; they need 68 .*: raise budget or lower pyramid_beta",
        ),
        ({"skip_layers": [0]}, r"need 30 KV cache groups, more than max_groups 8: .* \[29, 1\]"),
        ({"skip_layers": [0, 1], "max_groups": 14}, r"need 15 KV cache groups"),
        ({"policy": "pyramidal", "pyramid_steps": 9}, r"need 9 KV .*, more than max_groups 8"),
    ],
)
def test_plans_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        grouped_plan({"policy": "streaming", **values})
    assert "\n" not in str(error.value)


def test_skipping_a_sliding_layer_is_refused():
    with pytest.raises(ValueError, match=r"names \[0\], but the layers with full .* \[5, 11\]"):
        grouped_plan({"policy": "streaming", "skip_layers": [0]}, 12, [5, 11])


def named_splits(message: str) -> list[tuple[int, int]]:
    assert "Splits that work: " in message
    found = re.findall(r"(\d+) skipped with pyramid_steps (\d+)", message)
    return [(int(skipped), int(steps)) for skipped, steps in found]


@settings(deadline=None)
@given(
    st.integers(4, 48),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 10),
    st.sampled_from(["streaming", "pyramidal"]),
    st.sampled_from([1, 1.1, 2, 8]),
    st.sampled_from([128, 256, 1000, 4096, 0.25, 0.9]),
)
def test_named_splits_work(num_layers, skipped, steps, max_groups, policy, beta, budget):
    """Whatever the refusal recommends is accepted, with everything else as it was."""
    values = {"policy": policy, "pyramid_steps": steps, "max_groups": max_groups, "budget": budget}
    values |= {"pyramid_beta": beta, "skip_layers": list(range(min(skipped, num_layers - 1)))}
    try:
        grouped_plan(values, num_layers)
    except ValueError as error:
        if "KV cache groups" not in str(error):
            return
        for good_skipped, good_steps in named_splits(str(error)):
            split = {"skip_layers": list(range(good_skipped)), "pyramid_steps": good_steps}
            plan = grouped_plan(values | split, num_layers)
            assert plan.num_groups + plan.num_other_groups <= max_groups


def test_the_usual_split_is_named():
    with pytest.raises(ValueError, match="Splits that work") as error:
        grouped_plan({"policy": "pyramidal", "skip_layers": [0]})
    assert (0, 3) in named_splits(str(error.value))


def test_no_split_works():
    """Five layers with a sliding window for each full one: six groups, whatever is skipped."""
    with pytest.raises(ValueError, match="No split of this model works; raise max_groups"):
        grouped_plan({"policy": "streaming", "max_groups": 5}, 12, [5, 11])
    assert sum(num_groups([*step_sizes(2, 1), 10])) == 6
