"""Attention over packed pages: every build of the C++ kernels against the reference."""

import threading

import pytest
import torch
from hypothesis import given, settings
from kernel_builds import BUILDS, kernels_of
from kernel_cases import Case, Row, assert_close, cases, expected, make, poisoned_output

from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels.operands import Queries

EXAMPLES = settings(max_examples=60)


def check(build, case):
    problem = make(case)
    wanted, scores = expected(problem)
    found = poisoned_output(problem)
    kernels_of(build).attend(found, *problem[:4])
    assert_close(found, wanted)
    if scores is not None:
        torch.testing.assert_close(problem.side.scores, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
@given(case=cases())
@EXAMPLES
def test_any_attention_is_the_references(build, case):
    check(build, case)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("page_size", [16, 32, 48, 128])
def test_lengths_about_a_page(build, page_format, page_size):
    """One token of rows that end just before, at and after a page, an empty row between them."""
    entries = (1, page_size - 1, page_size, 0, page_size + 1, 3 * page_size + 1)
    rows = tuple(Row(min(1, count), count) for count in entries)
    check(build, Case(rows, page_format, page_size=page_size, scores=True, seed=page_size))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
def test_long_rows_of_many_spans(build, page_format):
    rows = (Row(1, 1500, 40), Row(1, 3), Row(1, 1100, 1100), Row(200, 700, 300))
    check(build, Case(rows, page_format, torch.bfloat16, scores=True, sinks=True, seed=7))
    check(build, Case(rows, page_format, group=11, kv_heads=1, weights=True, seed=8))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
def test_a_tokens_answer_does_not_depend_on_the_batch(build, page_format):
    """Bit for bit: alone, in a batch, and whichever thread works."""
    case = Case((Row(1, 1300), Row(5, 90), Row(0, 0), Row(1, 64)), page_format, scores=True)
    problem = make(case)
    together = poisoned_output(problem)
    kernels_of(build).attend(together, *problem[:4])
    scores = problem.side.scores
    starts = problem.queries.starts.tolist()
    for row in range(len(case.rows)):
        tokens = slice(starts[row], starts[row + 1])
        states = problem.queries.states[tokens]
        queries = Queries(states, torch.tensor([0, len(states)], dtype=torch.int32))
        (held,) = problem.segments
        one = [held._replace(table=held.table[row : row + 1], counts=held.counts[row : row + 1])]
        alone = torch.full_like(together[tokens], torch.nan)
        again = make(case).side.scores
        kernels_of(build).attend(
            alone, queries, one, problem.terms, problem.side._replace(scores=again)
        )
        assert torch.equal(alone, together[tokens])
        used = one[0].table[0, : -(-case.rows[row].entries // case.page_size)].long()
        assert torch.equal(again[used], scores[used])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(build, page_format, odd):
    """A key, a value and a query of one row; the others' outputs and scores stay as they are."""
    case = Case((Row(1, 70), Row(1, 600), Row(3, 40)), page_format, scores=True, seed=3)
    clean, broken = make(case), make(case)
    size = case.page_size
    page = int(broken.segments[0].table[1, 2])
    entry = torch.full((1, case.kv_heads, case.key_size), odd)
    kernels_of(build).write(
        broken.segments[0].blocks, case.layout, entry, entry, torch.tensor([page * size + 5])
    )
    broken.queries.states[4] = odd  # the last token of row 2
    outputs = []
    for problem in (clean, broken):
        outputs.append(poisoned_output(problem))
        kernels_of(build).attend(outputs[-1], *problem[:4])
    for token in (0, 2, 3):
        assert torch.equal(outputs[0][token], outputs[1][token])
    assert not outputs[1][4].isfinite().any()
    assert not outputs[1][1].isfinite().any()
    pages = broken.segments[0].table[0, : -(-70 // size)].long()
    assert torch.equal(broken.side.scores[pages], clean.side.scores[pages])


@pytest.fixture
def threads():
    """Sets how many threads work; one per core again afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("last", [Row(1, 340), Row(4, 330)])
def test_scores_of_pages_that_rows_share(build, last, threads):
    """A prefix in many rows: each adds its part, in the same order whoever works."""
    rows = (*(Row(1, 320 + row) for row in range(23)), last)
    problem = make(Case(rows, scores=True, kv_heads=1, key_size=16, value_size=16, seed=5))
    table = problem.segments[0].table
    table[1:, :20] = table[0, :20]
    wanted, scores = expected(problem)
    before = problem.side.scores.clone()
    found = []
    for count in [1] + [4] * 30:
        threads(count)
        output = poisoned_output(problem)
        problem.side.scores.copy_(before)
        kernels_of(build).attend(output, *problem[:4])
        assert_close(output, wanted)
        found.append(problem.side.scores.clone())
    torch.testing.assert_close(found[0], scores)
    assert all(torch.equal(found[0], one) for one in found)


@pytest.mark.parametrize("build", BUILDS)
def test_two_threads_at_once(build):
    """Calls overlap; each gives what it gives alone."""
    kernels = kernels_of(build)  # here, where it can skip
    problems = [make(Case((Row(1, 900), Row(30, 400)), name, scores=True)) for name in FORMATS]
    wanted = [expected(problem) for problem in problems]
    found = [[poisoned_output(problem) for _ in range(5)] for problem in problems]

    def work(index):
        for output in found[index]:
            kernels.attend(output, *problems[index][:4])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, (output, _) in zip(found, wanted, strict=True):
        for one in outputs:
            assert_close(one, output)
            assert torch.equal(one, outputs[0])
