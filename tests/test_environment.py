"""CompressionConfig.from_env: arguments, then the environment, then the defaults."""

import json
import warnings

import pytest

from paged_kv.config import CompressionConfig
from paged_kv.core.environment import CONFIG_VARIABLE
from paged_kv.option_table import DEFAULT_BUDGET, VARIABLES


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in (*VARIABLES.values(), CONFIG_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def environment(monkeypatch):
    def set_variables(policy=None, budget=None, options=None):
        values = {
            "PAGED_KV_POLICY": policy,
            "PAGED_KV_BUDGET": budget,
            "PAGED_KV_POLICY_CONFIG": options if isinstance(options, str) else json.dumps(options),
        }
        for name, value in values.items():
            if value not in (None, "null"):
                monkeypatch.setenv(name, value)

    return set_variables


def test_without_anything_the_defaults_hold():
    assert CompressionConfig.from_env() == CompressionConfig()
    assert not CompressionConfig.from_env(policy=None, budget=None).enabled


def test_variables_are_read(environment):
    environment("pyramidal+snapkv", "512", {"observation_window": 16, "recent_window": 20})
    wanted = {"policy": "pyramidal+snapkv", "budget": 512, "recent_window": 20}
    assert CompressionConfig.from_env() == CompressionConfig.from_dict(
        {**wanted, "observation_window": 16}
    )


def test_a_fraction_in_the_environment(environment):
    environment("streaming", "0.25")
    assert CompressionConfig.from_env().to_dict()["budget"] == "0.25"


def test_what_is_given_wins_one_by_one(environment):
    environment("snapkv", "512", {"observation_window": 16, "num_sink_tokens": 2})
    config = CompressionConfig.from_env(budget=256, num_sink_tokens=8)
    assert (config.policy, config.budget, config.num_sink_tokens) == ("snapkv", 256, 8)
    assert config.options["observation_window"] == 16
    assert CompressionConfig.from_env(observation_window=4).options["observation_window"] == 4


def test_none_is_not_given(environment):
    environment("streaming", "512")
    assert CompressionConfig.from_env(policy=None, budget=None).budget == 512


def test_another_policy_does_not_get_the_options_of_the_environment_s(environment):
    environment("snapkv", "512", {"observation_window": 16, "recent_window": 20})
    for policy in ("full", "h2o"):
        config = CompressionConfig.from_env(policy=policy)
        assert (config.policy, config.budget, config.recent_window) == (policy, 512, 20)
        assert "observation_window" not in config.options
    # Also one that has an option of that name: the value was meant for the other.
    assert CompressionConfig.from_env(policy="attention").options["observation_window"] == 150


def test_options_without_a_policy_are_for_the_one_that_is_given(environment):
    environment(options={"observation_window": 16})
    assert CompressionConfig.from_env(policy="snapkv").options["observation_window"] == 16


def test_an_empty_variable_is_not_set(environment):
    environment("", " ", "")
    config = CompressionConfig.from_env()
    assert (config.policy, config.budget) == ("full", DEFAULT_BUDGET)


@pytest.mark.parametrize(
    ("policy", "budget", "options", "message"),
    [
        ("h20", None, None, "PAGED_KV_POLICY: unknown kv-policy 'h20'; known are: full, "),
        ("h2o", "many", None, "PAGED_KV_BUDGET must be an integer >= 1 .* or .* not 'many'"),
        ("h2o", "0", None, "PAGED_KV_BUDGET must be"),
        ("h2o", None, "{", "PAGED_KV_POLICY_CONFIG is not JSON"),
        ("h2o", None, "[1]", "PAGED_KV_POLICY_CONFIG must be a JSON object"),
        ("h2o", None, {"policy": "lru"}, "CONFIG must not have policy: use PAGED_KV_POLICY"),
        ("h2o", None, {"budget": 3}, "CONFIG must not have budget: use PAGED_KV_BUDGET"),
        ("h2o", None, {"heavy": 1}, "unknown paged_kv option heavy; .*PAGED_KV_POLICY_CONFIG"),
        ("h2o", None, {"heavy_ratio": 7}, "heavy_ratio must be .*in PAGED_KV_POLICY_CONFIG"),
        (None, None, {"heavy_ratio": 0.5}, "unknown .* heavy_ratio; .*PAGED_KV_POLICY_CONFIG"),
    ],
)
def test_mistakes_name_the_variable(environment, policy, budget, options, message):
    environment(policy, budget, options)
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_env()


def test_a_wrong_argument_is_not_blamed_on_the_environment(environment):
    environment("h2o", "512")
    with pytest.raises(ValueError, match="budget must be") as error:
        CompressionConfig.from_env(budget=0)
    assert "PAGED_KV" not in str(error.value)


@pytest.mark.parametrize(
    ("outside", "given"), [("tiers", "pyramid_steps"), ("pyramid_steps", "tiers")]
)
def test_an_option_s_old_name(environment, outside, given):
    """What is given wins, by whatever name; another policy does not lose it."""
    environment("pyramidal+snapkv", None, {outside: 5})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert CompressionConfig.from_env(policy="pyramidal").pyramid_steps == 5
        assert CompressionConfig.from_env(**{given: 2}).pyramid_steps == 2
    assert {warning.category for warning in told} == {DeprecationWarning}


def test_an_option_by_both_its_names_in_the_environment(environment):
    environment("pyramidal", None, {"tiers": 5, "pyramid_steps": 4})
    with (
        pytest.warns(DeprecationWarning, match="tiers"),
        pytest.raises(ValueError, match=r"give pyramid_steps only.*in PAGED_KV_POLICY_CONFIG"),
    ):
        CompressionConfig.from_env()
