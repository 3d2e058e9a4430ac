import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.config import CompressionConfig
from paged_kv.core.budgets import step_sizes
from paged_kv.core.options import MOST, parse_json, text
from paged_kv.core.readers import read_budget
from paged_kv.option_table import DEFAULT_BUDGET
from paged_kv.plan import make_plan
from paged_kv.policies.streaming import Streaming
from paged_kv.registry import DEFAULT_SELECTOR
from paged_kv.vllm.frontend.grouping import group_layers, num_groups
from paged_kv.vllm.plan import GroupedPlan


def config(**values) -> CompressionConfig:
    return CompressionConfig.from_dict({"policy": "streaming", **values})


# ---- what is refused, and in what words


@pytest.mark.parametrize(
    "policy",
    [
        *("h20", "", "Streaming", "full+streaming", "pyramidal+", "pyramidal+pyramidal"),
        *("pyramidal+full", "+streaming", "+pyramidal", "a+pyramidal+streaming"),
        *(None, 3, ["full"]),
    ],
    ids=repr,
)
def test_an_unknown_policy_lists_those_that_exist(policy):
    with pytest.raises(ValueError, match="unknown kv-policy") as error:
        CompressionConfig.from_dict({"policy": policy})
    assert repr(policy) in str(error.value)
    assert "full, pyramidal, " in str(error.value)
    assert "streaming" in str(error.value).split("known are")[1]
    assert "pyramidal+NAME" in str(error.value)


@pytest.mark.parametrize("key", ["window", "options", "Budget", "kv_budget", 3], ids=repr)
def test_an_unknown_option_lists_those_that_exist(key):
    with pytest.raises(ValueError, match=f"unknown paged_kv option {key}; known are: ") as error:
        CompressionConfig.from_dict({"policy": "streaming", "budget": 512, key: 1})
    known = str(error.value).split("known are: ")[1].split(", ")
    assert known == sorted(known)
    assert {"policy", "budget", "num_sink_tokens", "skip_layers", "max_groups"} <= set(known)
    assert "options" not in known


NAN, INF = float("nan"), float("inf")
AT_LEAST = "must be an integer >= "
BAD_VALUES = [
    (
        "budget",
        "must be an integer >= 1 (at most 2147483647) or a number with a point between 0 and 1 "
        "(at least 1e-06)",
        [
            *(0, -1, 0.0, 1.0, 1.5, -0.5, 128.0, NAN, INF, True, None, [128]),
            *("", "many", "1/2", "50%", "²", "1e400", "1.0", "0"),
            *(2**31, 2**63, 10**23, "1" + "0" * 23, 1e-300, "1e-300", "1e-999999999", 0.9999999),
        ],
    ),
    ("num_sink_tokens", AT_LEAST + "0", [-1, 4.0, "4", None, True]),
    ("recent_window", AT_LEAST + "0", [-1, 0.5, "32", None, False]),
    ("min_budget", AT_LEAST + "1", [0, -5, 128.0, "128"]),
    ("pyramid_steps", AT_LEAST + "1", [0, 2.0, "3"]),
    ("max_groups", AT_LEAST + "1", [0, None]),
    ("pyramid_beta", "must be a number >= 1", [0.99, 0, -2, "2", None, True, NAN, INF]),
    ("compress_prefill", "must be true or false", [0, 1, "true", None]),
    ("skip_layers", "must be a list of layer indices", ["0,1", 3, None, {0: 1}, {1, 2}]),
]


@pytest.mark.parametrize(
    ("name", "allowed", "value"),
    [(name, allowed, value) for name, allowed, values in BAD_VALUES for value in values],
)
def test_a_bad_value_names_the_option_and_what_is_allowed(name, allowed, value):
    expected = f"^{re.escape(f'{name} {allowed}, not {value!r}')}$"
    with pytest.raises(ValueError, match=expected):
        config(**{name: value})


COUNTS = [name for name, allowed, _ in BAD_VALUES[1:] if allowed.startswith(AT_LEAST)]
COUNTS += ["residual_pages", "spill_budget", "fetch_limit", "spill_interval", "spill_host_budget"]


@pytest.mark.parametrize("value", [2**31, 2**63, 10**23])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_fits_into_31_bits(name, value):
    with pytest.raises(ValueError, match=rf"^{name} .* and <= 2147483647, not {value}$"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        *((name, "observation_window") for name in ("attention", "snapkv", "cluster", "hybrid")),
        *((name, "observation_window") for name in ("expected_attention", "past_future")),
        ("streaming", "spill_window"),
    ],
)
def test_a_window_of_queries_that_would_fill_the_memory(policy, name):
    with pytest.raises(ValueError, match=rf"^{name} must be .* <= 65536, not 65537$"):
        CompressionConfig.from_dict({"policy": policy, name: 65537})


LARGE = [10**5000, "1" * 5000, json.loads("[" * 900 + "]" * 900)]


@pytest.mark.parametrize("name", ["budget", "recent_window", "skip_layers", "pyramid_beta"])
@pytest.mark.parametrize("value", LARGE, ids=["number", "text", "lists"])
def test_a_value_that_is_too_large_to_be_shown(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be ") as error:
        config(**{name: value})
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[-1], ["1"], [1.0], [True], [[1]], [None]])
def test_a_bad_layer_is_named(value):
    expected = f"^{re.escape(f'skip_layers must be an integer >= 0, not {value[0]!r}')}$"
    with pytest.raises(ValueError, match=expected):
        config(skip_layers=[0, *value])


@pytest.mark.parametrize("values", [None, [], "streaming", 128])
def test_only_a_dict_is_a_config(values):
    with pytest.raises(ValueError, match="paged_kv must be a dict of options"):
        CompressionConfig.from_dict(values)


@pytest.mark.parametrize(
    "text", ["", "{", "{'pyramid_steps': 3}", '{"pyramid_steps": 3,}', "pyramid_steps=3"]
)
def test_what_is_not_json(text):
    with pytest.raises(ValueError, match="kv-policy-config is not JSON: ") as error:
        parse_json(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


DEEP = ["[" * 100_000, '{"pyramid_steps":' * 100_000, f'{{"pyramid_steps": {"1" * 5000}}}']


@pytest.mark.parametrize("text", DEEP, ids=["lists", "objects", "number"])
def test_json_that_cannot_be_read(text):
    """Nested 100,000 deep, or a number of 5,000 digits: one line."""
    with pytest.raises(ValueError, match=r"^kv-policy-config is not JSON: ") as error:
        parse_json(text)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["3", "[]", "null", '"pyramid_steps"'])
def test_json_that_is_no_object(text):
    with pytest.raises(ValueError, match="kv-policy-config must be a JSON object, not "):
        parse_json(text)


@pytest.mark.parametrize(
    ("values", "name", "needed"),
    [
        ({"budget": 67}, "budget 67", 68),
        ({"budget": 1}, "budget 1", 68),
        ({"budget": 103, "num_sink_tokens": 40}, "budget 103", 104),
        ({"budget": 0.5, "min_budget": 67}, "min_budget 67", 68),
        ({"budget": 0.5, "min_budget": 99, "recent_window": 64}, "min_budget 99", 100),
    ],
)
def test_a_budget_that_leaves_no_page_to_evict(values, name, needed):
    with pytest.raises(ValueError, match=rf"^{name} is too small: it must be at least {needed} "):
        config(**values).check_page_size(32)
    key = name.split()[0]
    config(**values | {key: needed}).check_page_size(32)
    with pytest.raises(ValueError, match="one page of 64"):
        config(**values | {key: needed}).check_page_size(64)


# ---- what is read


def test_defaults_keep_everything():
    default = CompressionConfig.from_dict({})
    assert default == CompressionConfig()
    assert not default.enabled
    assert config().enabled
    assert config().budget == DEFAULT_BUDGET


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (128, 128),
        ("128", 128),
        (" 128 ", 128),
        ("+128", 128),
        (0.25, Fraction(1, 4)),
        ("0.6", Fraction(3, 5)),
        (0.6, Fraction(3, 5)),  # what was written, not the nearest binary number
        (".5", Fraction(1, 2)),
        (Fraction(1, 4), Fraction(1, 4)),
        (1e-05, Fraction(1, 100_000)),
        (1 - 0.7, Fraction(3, 10)),
        (0.1 + 0.2, Fraction(3, 10)),
        (1 / 3, Fraction(1, 3)),
        ("0.3333333333333333", Fraction(1, 3)),
        (Fraction(1 - 0.7), Fraction(3, 10)),
        (1 / 6, Fraction(1, 6)),
        (0.123457, Fraction(123457, 1_000_000)),
    ],
)
def test_budget_is_read_exactly(value, expected):
    budget = read_budget("budget", value)
    assert (type(budget), budget) == (type(expected), expected)


@pytest.mark.parametrize(
    ("policy", "is_pyramid", "selector"),
    [
        ("streaming", False, "streaming"),
        ("pyramidal", True, DEFAULT_SELECTOR),
        ("pyramidal+streaming", True, "streaming"),
    ],
)
def test_policy_names(policy, is_pyramid, selector):
    read = CompressionConfig.from_dict({"policy": policy})
    assert (read.enabled, read.is_pyramid, read.selector) == (True, is_pyramid, selector)


def test_skip_layers_are_a_set():
    assert config(skip_layers=[3, 0, 3]).skip_layers == (0, 3)
    assert config(skip_layers=()).skip_layers == ()


def test_options_of_the_policy_have_defaults(monkeypatch):
    monkeypatch.setattr(Streaming, "options", {"color": text("red")})
    assert config().options == {"color": "red"}
    assert config(color="blue").options == {"color": "blue"}
    assert config(color="blue").to_dict()["color"] == "blue"
    assert CompressionConfig.from_dict({"policy": "full"}).options == {}
    with pytest.raises(ValueError, match=r"known are: .*budget, color, compress_prefill"):
        config(colour="blue")


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "policy": st.sampled_from(["full", "streaming", "pyramidal", "pyramidal+streaming"]),
            "budget": st.integers(1, MOST) | st.floats(1e-6, 1 - 1e-6),
            "num_sink_tokens": st.integers(0, MOST),
            "recent_window": st.integers(0, MOST),
            "pyramid_beta": st.floats(1, 1e6, exclude_max=True),
            "min_budget": st.integers(1, MOST),
            "compress_prefill": st.booleans(),
            "skip_layers": st.lists(st.integers(0, 99)),
            "pyramid_steps": st.integers(1, MOST),
            "max_groups": st.integers(1, MOST),
        },
    )
)
def test_round_trip_through_json(values):
    read = CompressionConfig.from_dict(values)
    carried = json.loads(json.dumps(read.to_dict()))
    assert CompressionConfig.from_dict(carried) == read
    budget = values.pop("budget", DEFAULT_BUDGET)
    assert abs(read.budget - budget) <= 1e-6 * isinstance(budget, float)  # it becomes a fraction
    assert read.skip_layers == tuple(sorted(set(values.pop("skip_layers", []))))
    assert {name: getattr(read, name) for name in values} == values


def test_reading_options_writes_nothing(monkeypatch, tmp_path):
    """Every process reads them; whether a directory can be written, the front end looks."""
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    options = {"spill": True, "swap_space": 1, "swap_dir_space": 1}
    for directory in (str(tmp_path), "/nowhere"):
        read = config(**options, spill_dir=directory, swap_dir=directory)
        assert (read.spill_dir, read.swap_dir) == (directory, directory)


def test_the_least_budget_is_computed_from_one_policy(monkeypatch):
    read, created = config(budget=256), []
    monkeypatch.setattr(
        CompressionConfig, "create_policy", lambda self: created.append(1) or Streaming(4, 32)
    )
    for page_size in (16, 32, 64):
        read.check_page_size(page_size)
        assert read.min_entries(page_size) == 36 + page_size
        assert "one page of" in read.describe_minimum(page_size)
    assert len(created) == 1
    assert read == config(budget=256)


def test_an_option_s_old_name():
    """Read, with a warning that points at whoever called the package."""
    with pytest.warns(DeprecationWarning, match="option tiers is now called pyramid_steps") as told:
        read = config(policy="pyramidal", tiers=5)
    assert [warning.filename for warning in told] == [__file__]
    assert read == config(policy="pyramidal", pyramid_steps=5)
    assert "tiers" not in read.to_dict()
    with (
        pytest.warns(DeprecationWarning, match="tiers"),
        pytest.raises(ValueError, match=r"^pyramid_steps must be an integer >= 1, not 0$"),
    ):
        config(tiers=0)


def test_an_option_by_both_its_names():
    with (
        pytest.warns(DeprecationWarning, match="tiers"),
        pytest.raises(ValueError, match=r"^tiers is the old name of pyramid_steps: give "),
    ):
        config(tiers=3, pyramid_steps=3)


# ---- the plan


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
