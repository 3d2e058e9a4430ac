"""The torch kernels that policies use, against plain loops and torch's own attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.kernels import reference, selection
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.kernels.rotary import Rotary


def attention_inputs(seed=0):
    """Queries [heads 2, group 3, queries 4, 8], keys [2, 11, 8] of positions in no order."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 3, 4, 8, generator=generator)
    keys = torch.randn(2, 11, 8, generator=generator)
    key_positions = torch.stack([torch.randperm(20, generator=generator)[:11] for _ in range(2)])
    return queries, keys, torch.tensor([19, 12, 7, 3]), key_positions


def probabilities(queries, keys, query_positions, key_positions, *terms):
    attention = DenseAttention(queries, keys, query_positions, key_positions, Terms(*terms))
    return reference.attention_probabilities(attention)


def test_attention_is_sdpa():
    queries, keys, query_positions, key_positions = attention_inputs()
    values = torch.eye(11).expand(2, 3, 11, 11)
    mask = key_positions[:, None, None, :] <= query_positions[:, None]
    expected = F.scaled_dot_product_attention(
        queries, keys[:, None].expand(2, 3, 11, 8), values, attn_mask=mask, scale=0.6
    )
    found = probabilities(queries, keys, query_positions, key_positions, 0.6)
    seen = mask.any(-1).expand(2, 3, 4)
    torch.testing.assert_close(found[seen], expected[seen])
    assert not found[~seen].any()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_by_hand(softcap, with_sinks):
    queries, keys, query_positions, key_positions = attention_inputs(1)
    sinks = torch.randn(2, 3, generator=torch.Generator().manual_seed(5)) if with_sinks else None
    found = probabilities(queries, keys, query_positions, key_positions, 0.6, softcap, sinks)
    for head, member, query in np.ndindex(2, 3, 4):
        logits = keys[head].double() @ queries[head, member, query].double() * 0.6
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        sees = key_positions[head] <= query_positions[query]
        weights = logits.exp() * sees
        total = weights.sum() + (sinks[head, member].double().exp() if with_sinks else 0)
        expected = weights / total if total else weights
        torch.testing.assert_close(found[head, member, query].double(), expected)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_missing_query_gives_nothing(with_sinks):
    queries, keys, _, key_positions = attention_inputs()
    sinks = torch.zeros(2, 3) if with_sinks else None
    missing = torch.tensor([-1, 30, -1, -1])
    found = probabilities(queries, keys, missing, key_positions, 1.0, 0.0, sinks)
    assert not found[:, :, [0, 2, 3]].any()
    total = found[:, :, 1].sum(-1)
    assert (total < 1).all() if with_sinks else torch.allclose(total, torch.ones(2, 3))


def test_large_logits_stay_finite():
    queries, keys, query_positions, key_positions = attention_inputs()
    found = probabilities(queries * 1e4, keys * 1e4, query_positions, key_positions, 1.0)
    assert found.isfinite().all()


FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@st.composite
def rows(draw):
    """Rows of one size: scores, distinct positions, what must stay, and how many go."""
    size, count = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    found = []
    for _ in range(count):
        scores = draw(st.lists(FLOATS, min_size=size, max_size=size))
        limit = st.integers(0, 2**31 - 1)
        positions = draw(st.lists(limit, min_size=size, max_size=size, unique=True))
        keep = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        found.append((scores, positions, keep, draw(st.integers(0, keep.count(False)))))
    return found


@given(rows())
def test_lowest_is_sorting(rows):
    scores, positions, keep, counts = (
        torch.tensor(part, dtype=dtype)
        for part, dtype in zip(
            zip(*rows, strict=True),
            (torch.float32, torch.int64, torch.bool, torch.int64),
            strict=True,
        )
    )
    found = selection.lowest(scores, positions, keep, counts, int(counts.max()))
    for row, (own_scores, own_positions, own_keep, count) in enumerate(rows):
        free = [i for i in range(len(own_scores)) if not own_keep[i]]
        order = sorted(free, key=lambda i: (own_scores[i], own_positions[i]))
        assert set(found[row].nonzero().flatten().tolist()) == set(order[:count])


@pytest.mark.parametrize("at_the_head", [True, False])
@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=5))
def test_pair_moves_is_pairing(at_the_head, rows):
    """Survivors of what is freed, in order, to the losers elsewhere, in order."""
    losers = torch.tensor(rows)
    counts, index = losers.sum(-1), torch.arange(9)
    limit = int(counts.max())
    head, tail = index < counts[:, None], index >= 9 - counts[:, None]
    freed, own = (head, 8) if at_the_head else (tail, 0)
    source, target = selection.pair_moves(losers, freed, limit, own)
    assert source.shape == target.shape == (len(rows), limit)
    for row, lost in enumerate(rows):
        gone = range(sum(lost)) if at_the_head else range(9 - sum(lost), 9)
        sources = [i for i in gone if not lost[i]]
        targets = [i for i in range(9) if lost[i] and i not in gone]
        expected = list(zip(sources, targets, strict=True))
        pairs = list(zip(source[row].tolist(), target[row].tolist(), strict=True))
        assert pairs[: len(expected)] == expected
        spare = expected[0] if expected else (own, own)
        assert pairs[len(expected) :] == [spare] * (limit - len(expected))


def rotary(neox: bool, scale: float = 1.0, half: int = 3) -> Rotary:
    return Rotary(10.0 ** (-torch.arange(half) / half), scale, neox)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_rotate_and_back(neox, scale):
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 7, 30, 49])
    turned = rotary(neox, scale).rotate(x, positions)
    torch.testing.assert_close(rotary(neox, scale).rotate(turned, positions, back=True), x)
    torch.testing.assert_close(turned[..., 6:], x[..., 6:])  # these do not turn
    torch.testing.assert_close(turned[..., :6].norm(dim=-1), scale * x[..., :6].norm(dim=-1))


@pytest.mark.parametrize("neox", [True, False])
def test_rotate_by_hand(neox):
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotary(neox).rotate(x, torch.tensor(5))
    for i in range(3):
        a, b = (i, i + 3) if neox else (2 * i, 2 * i + 1)
        number = complex(x[a], x[b]) * np.exp(5j * 10.0 ** (-i / 3))
        assert complex(turned[a], turned[b]) == pytest.approx(number, rel=1e-5)


def test_mean_rotation_is_the_mean_of_rotations():
    turn, x = rotary(True), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = turn.mean(torch.tensor([3, 4500]), 10)
    for event, start in enumerate([3, 4500]):
        positions = torch.arange(start, start + 10)
        expected = turn.rotate(x[event].expand(10, 8), positions).mean(0)
        # float32 angles of 4500 radians are good to 2e-4, of each position and of the middle
        torch.testing.assert_close(turn.turn(x, cos, sin)[event], expected, atol=2e-4, rtol=0)
