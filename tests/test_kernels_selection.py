"""What goes and where survivors move: the C++ kernels find exactly what torch's operations do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_builds import BUILDS, kernels_of

from paged_kv.kernels import selection

INF = float("inf")
LARGEST = torch.iinfo(torch.int64).max
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 3000))
LEADING = st.lists(st.integers(1, 3), max_size=4)
SCORES = {
    "many": lambda *shape: torch.randn(shape) * 10.0 ** torch.randint(-42, 30, shape),
    "few": lambda *shape: torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-45, 1.0, INF])[
        torch.randint(7, shape)
    ],
    "one": lambda *shape: torch.full(shape, -0.0),
}


@pytest.fixture(params=BUILDS, scope="module")
def compiled(request):
    return kernels_of(request.param)


def some_expanded(data, shape):
    """A shape that broadcasts to it: some dimensions are 1, or leading ones missing."""
    kept = [data.draw(st.sampled_from([1, size])) for size in shape[:-1]]
    return (*kept[data.draw(st.integers(0, len(kept))) :], shape[-1])


def strided(data, tensor):
    """Equal, but not contiguous."""
    how = data.draw(st.sampled_from(["as it is", "every other", "turned"]))
    if how == "every other":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    return tensor.mT.contiguous().mT if how == "turned" and tensor.dim() > 1 else tensor


def made_entries(data):
    """(scores, positions, keep, count, limit): distinct positions, enough that may be chosen."""
    shape = (*data.draw(LEADING), data.draw(SIZES))
    size = shape[-1]
    scores = SCORES[data.draw(st.sampled_from(sorted(SCORES)))](*some_expanded(data, shape))
    positions = torch.rand(shape).argsort(-1) * data.draw(st.sampled_from([1, 715_000]))
    kept_shape = some_expanded(data, shape)
    keep = torch.rand(kept_shape) < data.draw(st.sampled_from([0.0, 0.1, 0.97]))
    padding = torch.arange(size) >= size - data.draw(st.integers(0, size // 2))
    keep = keep | padding
    positions = positions.masked_fill(padding, LARGEST)
    may_go = (~keep).sum(-1).expand(shape[:-1])
    share = data.draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]))
    count = (may_go * share).long()
    if data.draw(st.booleans()):
        count = count.min().reshape([1] * data.draw(st.integers(0, len(shape) - 1)))
    limit = min(int(count.max()) + data.draw(st.integers(0, 2)), size)
    return scores, strided(data, positions), strided(data, keep), count, limit


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_the_lowest_are_those_of_torch(compiled, data, seed):
    torch.manual_seed(seed)
    operands = made_entries(data)
    found = compiled.lowest(*operands)
    assert torch.equal(found, selection.lowest(*operands))
    counted = operands[3].expand(found.shape[:-1]).clamp(max=operands[4])
    assert torch.equal(found.sum(-1), counted)


@pytest.mark.parametrize("size", [1, 7, 31, 1056])
def test_all_but_the_protected_can_go(compiled, size):
    scores = torch.full((2, size), INF)
    scores[1] = -INF
    positions = torch.arange(size).expand(2, size)
    keep = torch.arange(size) % 3 == 1
    count = (~keep).sum()
    operands = scores, positions, keep, count, min(int(count) + 1, size)
    assert torch.equal(compiled.lowest(*operands), ~keep.expand(2, size))
    assert torch.equal(selection.lowest(*operands), ~keep.expand(2, size))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_moves_are_those_of_torch(compiled, data, seed):
    """Also of rows whose losers are not as many as their freed places."""
    torch.manual_seed(seed)
    shape = (*data.draw(LEADING), data.draw(SIZES))
    size = shape[-1]
    share = data.draw(st.sampled_from([0.0, 0.05, 0.6, 1.0]))
    losers = strided(data, torch.rand(shape) < share)
    limit = min(int(losers.sum(-1).max()) + data.draw(st.integers(0, 2)), size)
    limit = max(limit, data.draw(st.integers(0, 1)))
    slots, lost = torch.arange(size), losers.sum(-1, keepdim=True)
    freed, spare = data.draw(
        st.sampled_from(
            [(slots < lost, size - 1), (slots >= size - lost, 0), (slots % 3 == 0, size // 2)]
        )
    )
    operands = losers, strided(data, freed), limit, spare
    expected = selection.pair_moves(*operands)
    for found, wanted in zip(compiled.pair_moves(*operands), expected, strict=True):
        assert torch.equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_first_places_are_those_of_torch(compiled, data, seed):
    torch.manual_seed(seed)
    shape = (*data.draw(LEADING), data.draw(SIZES))
    mask = torch.rand(some_expanded(data, shape)) < data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    mask = strided(data, mask).expand(shape)
    limit = data.draw(st.integers(0, shape[-1]))
    expected = selection.first_places(mask, limit)
    assert torch.equal(compiled.first_places(mask, limit), expected)
