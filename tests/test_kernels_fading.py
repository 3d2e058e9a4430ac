"""Scores that fade with each query: every build of the C++ kernels and the torch reference."""

import fading
import pytest
import torch
from kernel_builds import BUILDS, kernels_of
from kernel_cases import Case, Row, make, poisoned_output

from paged_kv.kernels import packed_reference

KERNELS = ("reference", *BUILDS)


def named(kernels: str):
    return packed_reference if kernels == "reference" else kernels_of(kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("row", fading.ROWS)
def test_the_definition(kernels, decay, row):
    """Beside rows with one token, many and none, whose pages stay as they are."""
    rows = (row, Row(1, 33), Row(0, 9), Row(5, 20), Row(0, 0))
    case = Case(rows, "int8", kv_heads=2, group=2, decay=decay, **fading.LOADED)
    fading.check_definition(named(kernels), case)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("row", [*fading.ROWS, Row(300, 1100), Row(300, 1100, 400)])
def test_chunks_do_not_matter(kernels, decay, row):
    fading.check_chunks(named(kernels), Case((row,), decay=decay, **fading.LOADED))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_outputs_do_not_fade(kernels, tokens):
    """What tokens see is what it is, bit for bit."""
    outputs = []
    for decay in (1.0, 0.5):
        problem = make(Case((Row(tokens, 70),), scores=True, decay=decay))
        outputs.append(poisoned_output(problem))
        named(kernels).attend(outputs[-1], *problem[:4])
    assert torch.equal(*outputs)
