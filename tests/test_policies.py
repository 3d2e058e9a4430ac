"""What holds for every policy, whatever it decides."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import CASES, cases, make, policies
from policy_regions import Shape, random_region, select

from paged_kv import registry
from paged_kv.policies.base import Policy, PositionalPolicy
from paged_kv.policies.region import Compaction, Region

MATRIX = pytest.mark.parametrize(("name", "options"), cases())


def mass_is_kept(name: str, options: dict) -> bool:
    """Whether every token is still in some weight afterwards."""
    return name in ("pooling", "residual") or (
        options.get("mode") == "centroid" or options.get("threshold") == -1
    )


def assert_sound(policy: Policy, region: Region, result: Compaction) -> None:
    """What the engines rely on."""
    positions, losers = region.positions, result.losers
    assert losers.dtype == torch.bool
    assert losers.shape == positions.shape
    assert not (losers & ~region.valid).any()
    assert (losers.sum(-1) == region.num_losers[:, None]).all()
    recent = positions >= (region.num_tokens - policy.recent_window)[:, None, None]
    protected = (positions < policy.num_sink_tokens) | recent
    assert not (losers & protected).any()
    stay = ~losers & region.valid
    changed = torch.zeros_like(losers) if result.changed is None else result.changed
    assert not (changed & (~stay | protected)).any()
    assert (changed.sum(-1) <= region.num_losers[:, None] + 1).all()
    for name in ("keys", "values", "weights"):
        after, before = getattr(result, name), getattr(region, name)
        if after is None:
            continue
        assert policy.merges
        assert after.shape == before.shape
        assert after.dtype == torch.float32
        assert after[stay].isfinite().all()
        same = stay & ~changed
        assert torch.equal(after[same], before[same])


def assert_same(one: Compaction, other: Compaction, exact: bool = True) -> None:
    for name, left, right in zip(Compaction._fields, one, other, strict=True):
        if left is None or right is None:
            assert left is right, name
        elif exact or left.dtype == torch.bool:
            assert torch.equal(left, right), name
        else:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def without_padding(region: Region, result: Compaction) -> Compaction:
    """Zeros where nobody looks: in padding and in losers."""
    stay = region.valid & ~result.losers

    def cleaned(x):
        return None if x is None else x.where(stay if x.ndim == 4 else stay[..., None], 0)

    return Compaction(result.losers, *(cleaned(part) for part in result[1:]))


@MATRIX
@pytest.mark.parametrize("seed", [10, 11])
def test_sound(name, options, seed):
    policy = make(name, options)
    region = random_region(policy, name, seed)
    assert_sound(policy, region, policy.compact(region))


@st.composite
def shapes(draw) -> Shape:
    extra = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    return Shape(
        extra=extra,
        losers=[draw(st.integers(0, free - 1)) for free in extra],
        dropped=[draw(st.integers(0, 30)) for _ in extra],
        layers=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
    )


@MATRIX
@settings(max_examples=15)
@given(shapes(), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32))
def test_sound_for_any_shape(name, options, shape, num_sinks, recent, seed):
    policy = make(name, options, num_sinks, recent)
    region = random_region(policy, name, seed, shape)
    result = policy.compact(region)
    assert_sound(policy, region, result)
    if mass_is_kept(name, options):
        assert_mass_kept(region, result)


def assert_mass_kept(region: Region, result: Compaction) -> None:
    assert result.weights is not None
    after = (result.weights * (region.valid & ~result.losers)).sum(-1)
    torch.testing.assert_close(after, region.weights.sum(-1))


@pytest.mark.parametrize(
    ("name", "options"), [case for case in cases() if mass_is_kept(*case.values)]
)
def test_weights_add_up(name, options):
    policy = make(name, options)
    region = random_region(policy, name, 12)
    assert_mass_kept(region, policy.compact(region))


@MATRIX
def test_nothing_to_lose(name, options):
    policy = make(name, options)
    region = random_region(policy, name, 13, Shape(losers=(0, 0, 0)))
    result = policy.compact(region)
    assert_sound(policy, region, result)
    assert not result.losers.any()
    assert result.changed is None or not result.changed.any()


@MATRIX
def test_deterministic(name, options):
    region = random_region(make(name, options), name, 14)
    # Policies are made anew in every process; attention is computed again.
    first = make(name, options).compact(replace(region))
    second = make(name, options).compact(replace(region))
    assert_same(without_padding(region, first), without_padding(region, second))


@MATRIX
def test_events_do_not_see_each_other(name, options):
    """Nor the padding, nor the other layers and heads: each rank has some of the heads."""
    policy = make(name, options)
    region = random_region(policy, name, 15)
    together = without_padding(region, policy.compact(region))
    shared = options.get("shared_heads", False)
    for layer, event in ((0, 0), (1, 1), (0, 2)):
        for heads in ([0, 1, 2],) if shared else ([0], [1, 2]):
            alone = select(region, [layer], event, heads)
            expected = without_padding(alone, policy.compact(alone))
            size = alone.positions.shape[-1]
            own = [
                None if part is None else part[[layer]][:, [event]][:, :, heads][:, :, :, :size]
                for part in together
            ]
            assert_same(Compaction(*own), expected, exact=False)


@MATRIX
def test_the_region_is_not_written(name, options):
    policy = make(name, options)
    region = random_region(policy, name, 16)
    names = ("positions", "keys", "values", "weights", "scores", "ratings")
    parts = {key: getattr(region, key) for key in names}
    before = {key: None if part is None else part.clone() for key, part in parts.items()}
    policy.compact(region)
    for key, part in parts.items():
        if part is not None:
            torch.testing.assert_close(part, before[key], rtol=0, atol=0, equal_nan=True)


@MATRIX
def test_slots_do_not_matter(name, options):
    """The same entries in other slots: the same ones go."""
    policy = make(name, options)
    region = random_region(policy, name, 17, Shape((20,), (11,), (9,)))
    order = torch.randperm(region.positions.shape[-1], generator=torch.Generator().manual_seed(1))
    names = ("positions", "keys", "values", "weights", "scores", "ratings")
    parts = {key: getattr(region, key) for key in names}
    moved = {key: None if part is None else part[:, :, :, order] for key, part in parts.items()}
    expected = [None if x is None else x[:, :, :, order] for x in policy.compact(region)]
    result = policy.compact(replace(region, **moved))
    assert_same(result, Compaction(*expected), exact=False)


@pytest.mark.parametrize("name", policies())
def test_reads(name):
    """Merging needs weights; what a policy reads is known; moves of positional ones are numpy's."""
    for options in CASES[name]:
        policy = make(name, options)
        regions = {"keys", "values", "weights", "scores", "ratings", "rotary"}
        assert policy.reads <= regions | {"query_statistics"}
        assert not policy.merges or "weights" in policy.reads
        assert not isinstance(policy, PositionalPolicy) or not policy.reads


@pytest.mark.parametrize("name", ["residual", "value_merge"])
@pytest.mark.parametrize("inner", policies())
def test_wrappers_take_every_evicting_policy(name, inner):
    if not issubclass(registry.load(inner), registry.load("knorm").__base__):
        with pytest.raises(ValueError, match="of must be one of"):
            make(name, {"of": inner})
        return
    policy = make(name, {"of": inner})
    assert policy.reads >= make(inner, {}).reads
    region = random_region(policy, name, 18)
    assert_sound(policy, region, policy.compact(region))


def test_a_wrapper_keeps_its_options_to_itself():
    """Both have a threshold: that of what is wrapped stays at its default."""
    policy = make("value_merge", {"of": "lru", "threshold": -1})
    assert policy.inner.settings["threshold"] == 0.01
