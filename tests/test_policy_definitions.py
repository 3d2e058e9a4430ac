"""Each policy against its definition in plain Python."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from policy_cases import cases, make
from policy_definitions import DEFINITIONS
from policy_heads import selector, with_defaults
from policy_regions import Shape, heads_of, random_region

from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.h2o import H2O
from paged_kv.policies.residual import Residual

NUM_SINKS, RECENT = 2, 3
SHAPES = [
    Shape(),
    Shape(extra=(2, 61, 25), losers=(1, 60, 12), dropped=(5, 0, 3), softcap=2.0, neox=False),
    Shape(extra=(40,), losers=(13,), dropped=(17,), layers=1, group=3, sinks=True, rotary_dim=4),
    Shape(extra=(9, 33), losers=(8, 20), dropped=(0, 0), heads=1, group=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize(("name", "options"), cases())
def test_definition(name, options, shape):
    policy = make(name, options, NUM_SINKS, RECENT)
    check(name, options, policy, random_region(policy, name, 1, shape))


def check(name, options, policy, region) -> None:
    result = policy.compact(region)
    layers, events = region.positions.shape[:2]
    for layer, event in np.ndindex(layers, events):
        for head, own in enumerate(heads_of(region, NUM_SINKS, RECENT, layer, event)):
            compare(result, DEFINITIONS[name](own, options), (layer, event, head), own)


def compare(result, expected, place, own) -> None:
    losers, *content = expected
    assert set(result.losers[place].nonzero().flatten().tolist()) == losers
    stay = [slot for slot in range(len(own.positions)) if slot not in losers]
    for name, expected_part in zip(("keys", "values", "weights"), content, strict=True):
        found, before = getattr(result, name), getattr(own, name)
        if before is None:
            assert found is None
            continue
        after = before if found is None else found[place][: len(before)].numpy()
        np.testing.assert_allclose(after[stay], expected_part[stay], rtol=1e-5, atol=1e-5)


def cases_where(holds) -> list:
    """The cases in which something holds of the policy."""
    return [case for case in cases() if holds(make(*case.values))]


# What reads rotary guesses the next queries from the last ones: there must be some.
@pytest.mark.parametrize(
    ("name", "options"), cases_where(lambda policy: "rotary" not in policy.reads)
)
def test_nobody_attends(name, options):
    """No query at all: all scores are 0, and what is said of ties decides."""
    policy = make(name, options, NUM_SINKS, RECENT)
    region = random_region(policy, name, 3)
    if region.queries is not None:
        missing = torch.full_like(region.queries.positions, -1)
        region = replace(region, queries=replace(region.queries, positions=missing))
    check(name, options, policy, region)


@pytest.mark.parametrize("window", [2, 5])
def test_ties_between_coordinates(window):
    """Keys of small integers: coordinates and members tie often."""
    options = {"mode": "best", "best_by": "coordinates", "window": window}
    policy = make("pooling", options, NUM_SINKS, RECENT)
    region = random_region(policy, "pooling", 4)
    check("pooling", options, policy, replace(region, keys=region.keys.round()))


def test_no_survivor_to_merge_into():
    """All but the sinks and the recent entries go: nothing is folded."""
    policy = make("value_merge", {"of": "knorm", "threshold": -1}, NUM_SINKS, RECENT)
    region = random_region(policy, "value_merge", 5, Shape((6, 9), (6, 4), (0, 8)))
    result = policy.compact(region)
    assert not result.changed[:, 0].any()
    assert torch.equal(result.weights[:, 0], region.weights[:, 0])
    assert (result.changed[:, 1].sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("name", "options"), cases_where(lambda policy: isinstance(policy, ScoringPolicy))
)
def test_scores(name, options):
    """Not only the order: the numbers too, of the entries that may go."""
    policy = make(name, options, NUM_SINKS, RECENT)
    region = random_region(policy, name, 2)
    scores = policy.score(region).expand(region.positions.shape)
    free = ~policy.protected(region)
    for layer, event in ((0, 0), (1, 1), (0, 2)):
        for head, own in enumerate(heads_of(region, NUM_SINKS, RECENT, layer, event)):
            expected = DEFINITIONS[name].score(own, options)
            ours = scores[layer, event, head][: len(expected)].double().numpy()
            may_go = free[layer, event, head][: len(expected)].numpy() & (expected < 1e29)
            np.testing.assert_allclose(ours[may_go], expected[may_go], rtol=1e-4, atol=1e-6)


def accumulation(generator):
    """Probabilities [sequences 2, heads 2, group 3, queries 5, m 7], scores and positions."""
    probabilities = torch.rand(2, 2, 3, 5, 7, generator=generator) ** 4
    probabilities[1, :, :, 3:] = 0  # queries that are missing
    scores = torch.rand(2, 2, 7, generator=generator) * 20
    positions = torch.tensor([[10, 11, 12, 13, 14], [30, 31, 32, -1, -1]])
    return scores, probabilities, positions


THRESHOLDS = [("lru", {"threshold": threshold}) for threshold in (0, 1)]


@pytest.mark.parametrize(
    ("name", "options"), [*cases_where(lambda policy: "scores" in policy.reads), *THRESHOLDS]
)
def test_accumulate(name, options):
    """Query by query, as the definition has it; those that are missing give nothing."""
    scores, probabilities, positions = accumulation(torch.Generator().manual_seed(3))
    result = make(name, options).accumulate(scores.clone(), probabilities, positions)
    name, options = selector(name, options)
    options = with_defaults(name, options)
    for sequence, head in np.ndindex(2, 2):
        expected = scores[sequence, head].double().numpy()
        given = probabilities[sequence, head].double().numpy()
        for query, position in enumerate(positions[sequence].tolist()):
            if position >= 0:
                shares = given[:, query]
                expected = DEFINITIONS[name].accumulate(expected, shares, position, options)
        np.testing.assert_allclose(result[sequence, head], expected, rtol=2e-6)


class Fading(H2O):
    """Scores that a policy says the decay of, and no more."""

    score_decay = 0.7


@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_scores_fade(chunks):
    """Query by query, in whatever chunks they come; for those that are missing nothing fades."""
    scores, probabilities, positions = accumulation(torch.Generator().manual_seed(4))
    result = scores.clone()
    parts = probabilities.split(chunks, -2), positions.split(chunks, -1)
    for given, asked in zip(*parts, strict=True):
        result = Fading(4, 8).accumulate(result, given, asked)
    for sequence, head, entry in np.ndindex(scores.shape):
        expected = float(scores[sequence, head, entry])
        for query, position in enumerate(positions[sequence].tolist()):
            if position >= 0:
                expected *= 0.7
            for member in range(3):
                expected += float(probabilities[sequence, head, member, query, entry])
        assert float(result[sequence, head, entry]) == pytest.approx(expected, rel=1e-5)


def test_a_sum_is_the_sum_bit_for_bit():
    scores, probabilities, positions = accumulation(torch.Generator().manual_seed(5))
    result = H2O(4, 8).accumulate(scores, probabilities, positions)
    assert torch.equal(result, scores + probabilities.sum((-3, -2)))


def test_only_what_says_its_decay_is_left_to_the_kernels():
    """A policy that accumulates in its own way keeps its own pass, whatever it inherits."""

    class Renamed(H2O):
        pass

    class Own(H2O):
        def accumulate(self, scores, probabilities, positions):
            return super().accumulate(scores / 2, probabilities, positions)

    class Around(Residual):
        def accumulate(self, scores, probabilities, positions):
            return scores

    said = {cls: cls(4, 8).kernel_decay for cls in (H2O, Renamed, Fading, Own)}
    assert said == {H2O: 1, Renamed: 1, Fading: 0.7, Own: None}
    given = accumulation(torch.Generator().manual_seed(6))
    assert Own(4, 8).accumulate(*given).shape == given[0].shape  # what it inherits still works
    assert make("residual", {"of": "h2o"}).kernel_decay == 1
    assert Residual(Fading(4, 8)).kernel_decay == 0.7
    assert torch.equal(Residual(Fading(4, 8)).accumulate(*given), Fading(4, 8).accumulate(*given))
    assert make("residual", {"of": "lru"}).kernel_decay is None
    assert make("lru", {}).kernel_decay is None
    assert make("knorm", {}).kernel_decay is None
    assert Around(H2O(4, 8)).kernel_decay is None
