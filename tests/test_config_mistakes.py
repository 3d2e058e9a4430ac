"""Options that are refused, and in what words."""

import json
import re

import pytest

from paged_kv.config import CompressionConfig
from paged_kv.core.options import parse_json


def config(**values) -> CompressionConfig:
    return CompressionConfig.from_dict({"policy": "streaming", **values})


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
    ("start", "must be one of always, pressure", ["now", "Pressure", True, None, 0]),
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
