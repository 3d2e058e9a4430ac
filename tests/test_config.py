"""How options are read."""

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.config import CompressionConfig
from paged_kv.core.options import MOST, text
from paged_kv.core.readers import read_budget
from paged_kv.option_table import DEFAULT_BUDGET
from paged_kv.policies.streaming import Streaming
from paged_kv.registry import DEFAULT_SELECTOR


def config(**values) -> CompressionConfig:
    return CompressionConfig.from_dict({"policy": "streaming", **values})


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
