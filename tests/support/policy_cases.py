"""The matrix of policies that the tests share: one line in CASES for each policy."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import query_files

from paged_kv import registry
from paged_kv.policies.base import Policy

Options = dict[str, Any]


@dataclass(frozen=True)
class Cases:
    """What to test a policy with; iterating gives the options of the matrix.

    Args:
        matrix: options for everything but vLLM: tensors (test_policies, test_policy_definitions)
            and pages in transformers.
        engine: options for real vLLM (test_policy_equivalence): few, since each starts an engine;
            what the policy protects must be less than a budget of 96.
        wrong: values of every option that it declares, each of which must be refused.
        has_accumulator: no more than one entry of each head stands for several tokens.
    """

    matrix: list[Options] = field(default_factory=lambda: [{}])
    engine: list[Options] = field(default_factory=lambda: [{}])
    wrong: dict[str, list[Any]] = field(default_factory=dict)
    has_accumulator: bool = False

    def __iter__(self) -> Iterator[Options]:
        return iter(self.matrix)


WINDOW = {"observation_window": 8}
NEAR = {"n_future": 8, "observation_window": 16}
OF_LLAMA = query_files.shared(6, 2, 2, 32)  # tiny_models' "llama"
OF_REGIONS = query_files.shared(7, 8, 2, 8)  # policy_regions' layers and heads
CALIBRATED = {"statistics": OF_LLAMA}

CASES: dict[str, Cases] = {
    "attention": Cases(
        [{}, {"observation_window": 6}, {"observation_window": 6, "aggregation": "max"}],
        wrong={"observation_window": [0, 1.5], "aggregation": ["mean"]},
    ),
    "calibrated_attention": Cases(
        [
            {"fading": "off", **CALIBRATED},
            {"fading": "on", **CALIBRATED},
            {"fading": "on", "half_life": 5.5, **CALIBRATED},
        ],
        engine=[
            {"fading": "off", **CALIBRATED},
            {"fading": "on", "half_life": 40, **CALIBRATED},
        ],
        wrong={
            "fading": ["always", True],
            "half_life": [0, 0.5, "long"],
            "statistics": [7, "/nowhere/at/all.safetensors"],
        },
    ),
    "cluster": Cases(
        [
            {},
            {"mode": "evict", "num_clusters": 4, "observation_window": 6},
            {"mode": "centroid", "num_clusters": 4, "iterations": 2},
            {"mode": "centroid", "num_clusters": 1000, "observation_window": 6},
        ],
        engine=[
            {"mode": "evict", "num_clusters": 6, **WINDOW},
            {"mode": "centroid", "num_clusters": 6, **WINDOW},
        ],
        wrong={
            "mode": ["merge"],
            "num_clusters": [0],
            "iterations": [0],
            "observation_window": [0],
        },
    ),
    "expected_attention": Cases(
        [
            {},
            {"n_future": 3, "epsilon": 0.02, "observation_window": 6},
            {"n_future": 1000, "observation_window": 2},
        ],
        engine=[NEAR],
        wrong={"n_future": [0], "epsilon": [-0.1, float("nan")], "observation_window": [1]},
    ),
    "h2o": Cases(
        [{}, {"heavy_ratio": 0.1, "recent_ratio": 0.0}, {"heavy_ratio": 0, "recent_ratio": 1}],
        wrong={"heavy_ratio": [-0.1], "recent_ratio": [1.1, True]},
    ),
    "hybrid": Cases(
        [{}, {"split_ratio": 0.2, "observation_window": 6}, {"split_ratio": 1}],
        engine=[WINDOW],
        wrong={"split_ratio": [1.01, "half"], "observation_window": [0], "aggregation": [1]},
    ),
    "keydiff": Cases(),
    "knorm": Cases(),
    "learned": Cases(wrong={"weights": [3, "/nowhere/at/all.npz"]}),
    "lru": Cases(
        [{}, {"threshold": 0.3}], engine=[{"threshold": 0.05}], wrong={"threshold": [1.5, None]}
    ),
    "past_future": Cases(
        [
            {},
            {"n_future": 3, "epsilon": 0.02, "observation_window": 6},
            {"observation_window": 6, "aggregation": "max"},
        ],
        engine=[NEAR],
        wrong={"n_future": [0], "epsilon": [2], "observation_window": [1], "aggregation": [""]},
    ),
    "pooling": Cases(
        [
            {},
            {"mode": "mean", "window": 3},
            {"mode": "max", "window": 4},
            {"mode": "max", "window": 1000},
            {"mode": "best", "window": 2},
            {"mode": "best", "best_by": "coordinates", "window": 3},
        ],
        engine=[
            {"mode": "mean"},
            {"mode": "max", "window": 3},
            {"mode": "best", "best_by": "attention"},
            {"mode": "best", "best_by": "coordinates"},
        ],
        wrong={"mode": ["median"], "window": [1, True], "best_by": ["luck"]},
    ),
    "random": Cases([{}, {"seed": 2**70 + 5}], engine=[{"seed": 3}], wrong={"seed": [-1, 0.5]}),
    "residual": Cases(
        [{}, {"mode": "sum", "of": "random"}, {"of": "snapkv", "observation_window": 6}],
        engine=[{"of": "h2o"}, {"of": "snapkv", "mode": "sum", **WINDOW}],
        wrong={"of": ["pooling", "nothing", ["h2o"]], "mode": ["max"]},
        has_accumulator=True,
    ),
    "snapkv": Cases(
        [{}, {"observation_window": 6, "kernel_size": 4}, {**WINDOW, "aggregation": "max"}],
        engine=[WINDOW, {**WINDOW, "aggregation": "max"}],
        wrong={"observation_window": [0], "kernel_size": [0], "aggregation": ["largest"]},
    ),
    "streaming": Cases(),
    "tova": Cases(
        [{}, {"shared_heads": True}],
        engine=[{}, {"shared_heads": True}],
        wrong={"shared_heads": [1]},
    ),
    "value_merge": Cases(
        [
            {},
            {"threshold": -1, "of": "knorm"},
            {"threshold": 0.2, "of": "tova"},
            {"threshold": -1, "of": "lru"},
        ],
        engine=[{"of": "snapkv", "threshold": 0.1, **WINDOW}],
        wrong={"of": ["residual", 3], "threshold": [-1.5]},
    ),
    "window": Cases(),
}


def policies() -> list[str]:
    """The names of all policies that choose: of this package, and of others that are installed."""
    return [
        name for name in registry.available() if name not in (registry.FULL, registry.PYRAMIDAL)
    ]


def cases() -> list:
    """A pytest parameter (name, options) for each case of the matrix, to be used with regions."""
    named = {name: CASES[name].matrix for name in policies() if name in CASES}
    return _parameters({name: [*map(of_regions, several)] for name, several in named.items()})


def of_regions(options: Options) -> Options:
    """The same with a file that knows the layers and heads of random regions."""
    return {**options, "statistics": OF_REGIONS} if "statistics" in options else options


def engine_cases() -> list:
    """The same for each run in vLLM."""
    return _parameters({name: CASES[name].engine for name in policies() if name in CASES})


def _parameters(options_by_name: dict[str, list[Options]]) -> list:
    parameters = []
    for name, variants in options_by_name.items():
        for options in variants:
            shown = {key: _shown(value) for key, value in options.items()}
            label = ",".join(f"{key}={value}" for key, value in shown.items())
            parameters.append(pytest.param(name, options, id=f"{name}({label})"))
    return parameters


def _shown(value: Any) -> Any:
    """Of a path only the file's name."""
    is_path = isinstance(value, str) and "/" in value
    return Path(value).name if is_path else value


def make(name: str, options: Options, num_sinks: int = 2, recent: int = 3) -> Policy:
    """The policy, its options read as a user's are."""
    declared = registry.declared(name, options)
    values = {key: declared[key].read(key, value) for key, value in options.items()}
    return registry.create(name, num_sinks, recent, values)
