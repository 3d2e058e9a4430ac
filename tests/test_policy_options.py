"""Wrong values of policies' options: refused, by name, before anything runs."""

import numpy as np
import pytest
import torch
from policy_cases import CASES, make, policies
from policy_regions import Shape, random_region

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.policies import learned

WRONG = [
    (name, option, value)
    for name in policies()
    if name in CASES
    for option, values in CASES[name].wrong.items()
    for value in values
]


@pytest.mark.parametrize(("name", "option", "value"), WRONG)
def test_wrong_values(name, option, value):
    with pytest.raises(ValueError, match=option):
        CompressionConfig.from_dict({"policy": name, option: value})


@pytest.mark.parametrize("name", policies())
def test_every_option_has_a_wrong_value(name):
    tried = {option for policy, option, _ in WRONG if policy == name}
    assert tried == set(registry.load(name).options), (
        f"`wrong` of {name} in tests/support/policy_cases.py must have a value for each option"
    )


@pytest.mark.parametrize("name", policies())
def test_options_of_the_matrix_are_accepted(name):
    for options in CASES[name]:
        config = CompressionConfig.from_dict({"policy": name, **options})
        assert CompressionConfig.from_dict(config.to_dict()) == config


def test_h2o_needs_a_ratio():
    with pytest.raises(ValueError, match="heavy_ratio and recent_ratio"):
        make("h2o", {"heavy_ratio": 0, "recent_ratio": 0.0})


@pytest.fixture
def network() -> dict[str, np.ndarray]:
    with np.load(learned.SHIPPED) as file:
        return {name: file[name] for name in file.files}


def test_the_network_can_be_another(tmp_path, network):
    """Other weights, another width: other scores, and none from the shipped file."""
    rng = np.random.default_rng(0)
    network |= {"w1": rng.normal(size=(5, 3)), "b1": np.zeros(3), "w2": rng.normal(size=(3, 1))}
    np.savez(tmp_path / "net.npz", **network)
    policy = make("learned", {"weights": str(tmp_path / "net.npz")})
    region = random_region(policy, "learned", 1)
    assert not torch.equal(policy.score(region), make("learned", {}).score(region))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("w1", None),
        ("w1", np.zeros((4, 16))),
        ("b1", np.zeros(())),
        ("w2", np.zeros(16)),
        ("b2", np.array(["a"])),
        ("mean", np.full(5, np.nan)),
        ("std", np.zeros(5)),
        ("num_layers", np.array(0)),
    ],
)
def test_a_malformed_network(tmp_path, network, part, value):
    network[part] = value
    arrays = {name: array for name, array in network.items() if array is not None}
    np.savez(tmp_path / "net.npz", **arrays)
    with pytest.raises(ValueError, match=f"weights: .*{part}"):
        make("learned", {"weights": str(tmp_path / "net.npz")})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x93NUMPY", b"text"])
def test_no_network_at_all(tmp_path, content):
    (tmp_path / "net.npz").write_bytes(content)
    with pytest.raises(ValueError, match="weights"):
        make("learned", {"weights": str(tmp_path / "net.npz")})


def test_an_array_instead_of_a_network(tmp_path):
    np.save(tmp_path / "net.npy", np.zeros(3))
    with pytest.raises(ValueError, match="weights"):
        make("learned", {"weights": str(tmp_path / "net.npy")})


def test_pickles_are_not_loaded(tmp_path, network):
    network["w1"] = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "net.npz", **network)
    with pytest.raises(ValueError, match="weights"):
        make("learned", {"weights": str(tmp_path / "net.npz")})


def test_features():
    """By hand: one entry at position 2 of 5, key (3, 4), value (0, 2), layer 6 of 12."""
    policy = make("learned", {})
    region = random_region(policy, "learned", 1, Shape((1,), (0,), (0,), layers=2, heads=1))
    keys = torch.zeros_like(region.keys)
    keys[..., 2, :2] = torch.tensor([3.0, 4.0])
    keys[..., 3, 0] = 1.0
    values = torch.zeros_like(region.values)
    values[..., 2, 1] = 2.0
    object.__setattr__(region, "keys", keys)
    object.__setattr__(region, "values", values)
    found = learned.features(region, 12)[1, 0, 0]
    assert found.shape == (6, 5)
    mean_cosine = (3 * 4 + 4 * 4) / (5 * 32**0.5)  # of (3, 4) and (4, 4)
    expected = [np.log(1 + 6 - 2), np.log(5), np.log(2), 1 - mean_cosine, 6 / 12]
    np.testing.assert_allclose(found[2], expected, rtol=1e-5)
    assert found.isfinite().all()
