"""Scores that fade, by their definition: token by token, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kernel_cases
import torch
from kernel_cases import Case, Problem, Row

from paged_kv.kernels import packed_reference
from paged_kv.kernels.operands import Queries

Tensor = torch.Tensor

# With all that changes probabilities: several tokens need more than one tile of either backend.
LOADED = {"scores": True, "weights": True, "sinks": True, "softcap": 2.5}
ROWS = (Row(1, 20), Row(70, 90), Row(70, 70), Row(1, 40, 7), Row(50, 90, 64))


def check_definition(kernels: Any, case: Case) -> None:
    """What attend of a protocol.Kernels makes of the scores of all pages."""
    problem = _make(case)
    wanted = _by_definition(problem)
    kernels.attend(kernel_cases.poisoned_output(problem), *problem[:4])
    torch.testing.assert_close(problem.side.scores.double(), wanted, rtol=1e-4, atol=1e-5)


def check_chunks(kernels: Any, case: Case, sizes: Sequence[int] = (1, 16)) -> None:
    """A row whose tokens come at once, one by one, and in chunks: the same scores."""
    (row,) = case.rows
    found = []
    for size in (row.tokens, *sizes):
        problem = _make(case)
        for first in range(0, row.tokens, size):
            step = _step(problem, first, min(first + size, row.tokens))
            kernels.attend(kernel_cases.poisoned_output(step), *step[:4])
        found.append(problem.side.scores)
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-4, atol=1e-5)


def _make(case: Case) -> Problem:
    """Entries just written have no scores yet."""
    problem = kernel_cases.make(case)
    for number, row in enumerate(case.rows):
        new = torch.arange(row.entries - row.tokens, row.entries)
        page = problem.segments[0].table[number, new // case.page_size].long()
        problem.side.scores[page, :, new % case.page_size] = 0
    return problem


def _step(problem: Problem, first: int, last: int) -> Problem:
    """The tokens [first, last) of the only row, before those after them are written."""
    states = problem.queries.states[first:last]
    starts = torch.tensor([0, len(states)], dtype=torch.int32)
    *others, newest = problem.segments
    counts = newest.counts - (len(problem.queries.states) - last)
    segments = [*others, newest._replace(counts=counts)]
    return problem._replace(queries=Queries(states, starts), segments=segments)


def _by_definition(problem: Problem) -> Tensor:
    """float64 [pages, kv_heads, page_size]."""
    (states, starts), segments, _, side, _ = problem
    scores, page_size = side.scores.double(), segments[0].layout.page_size
    for row in range(len(starts) - 1):
        start, end = starts[row : row + 2].tolist()
        keys = packed_reference._entries("key", row, segments).double()
        for token in range(start, end):
            seen = keys.shape[1] - (end - token) + 1
            for slot in range(seen):
                page = int(segments[0].table[row, slot // page_size])
                scores[page, :, slot % page_size] *= side.decay
            for head in range(states.shape[1]):
                kv_head = head * len(keys) // states.shape[1]
                places = [divmod(slot, page_size) for slot in range(seen)]
                places = [(int(segments[0].table[row, page]), slot) for page, slot in places]
                given = _given(problem, head, token, keys[kv_head, :seen], places)
                for (page, slot), share in zip(places, given, strict=True):
                    scores[page, kv_head, slot] += share
    return scores


def _given(
    problem: Problem, head: int, token: int, keys: Tensor, places: list[tuple[int, int]]
) -> Tensor:
    """float64 [entries]: what one query head gives to the entries in these (page, slot)."""
    terms, weights = problem.terms, problem.side.weights
    logits = keys @ problem.queries.states[token, head].double() * terms.scale
    if terms.softcap:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    shares = logits.exp()
    if weights is not None:
        kv_head = head * weights.shape[1] // problem.queries.states.shape[1]
        shares = shares * torch.stack([weights[page, kv_head, slot] for page, slot in places])
    rest = 0.0 if terms.sinks is None else terms.sinks[head].double().exp()
    return shares / (shares.sum() + rest)
