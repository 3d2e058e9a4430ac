from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.core.readers import read_budget
from paged_kv.core.schedule import MAX_DENOMINATOR, MAX_TOKENS, Schedule, cdiv

PAGE_SIZES = st.sampled_from([1, 2, 16, 32, 48, 128])
LENGTHS = st.integers(0, 5000)
LONG = st.integers(0, MAX_TOKENS) | LENGTHS
FRACTIONS = st.floats(1e-6, 1 - 1e-6) | st.builds(Fraction, st.floats(1e-6, 1 - 1e-6))


@st.composite
def schedules(draw) -> Schedule:
    """Constant and fractional budgets; with one page in the minimum, as the config asks for."""
    page_size = draw(PAGE_SIZES)
    denominator = draw(st.integers(2, 1000))
    numerator = draw(st.integers(0, denominator - 1))
    minimum = page_size + draw(st.integers(0, 600))
    return Schedule(page_size, minimum, numerator, denominator, draw(st.booleans()))


def definition(schedule: Schedule, num_tokens: int, prompt_len: int) -> int:
    fraction = Fraction(schedule.numerator, schedule.denominator)
    budget = max(schedule.minimum, ceil(fraction * num_tokens))
    if num_tokens < prompt_len and not schedule.compress_prefill:
        return 0
    return max(0, (num_tokens - budget) // schedule.page_size * schedule.page_size)


@st.composite
def schedules_of_users(draw) -> Schedule:
    """Whatever budget is accepted, up to the largest numbers."""
    budget = read_budget("budget", draw(st.integers(1, 2**31 - 1) | FRACTIONS))
    minimum, numerator, denominator = budget, 0, 1
    if isinstance(budget, Fraction):
        minimum, (numerator, denominator) = draw(LONG), budget.as_integer_ratio()
    return Schedule(draw(PAGE_SIZES), minimum, numerator, denominator, draw(st.booleans()))


@given(schedules_of_users(), st.lists(st.tuples(LONG, LONG), min_size=1, max_size=9))
def test_no_budget_and_no_length_leaves_int64(schedule, pairs):
    num_tokens, prompt_lens = np.array(pairs, dtype=np.int64).T
    evicted = schedule.evicted(num_tokens, prompt_lens)
    assert evicted.tolist() == [definition(schedule, *pair) for pair in pairs]
    assert evicted.tolist() == [schedule.evicted(*pair) for pair in pairs]
    assert np.broadcast_to(schedule.budget(num_tokens), num_tokens.shape).tolist() == [
        schedule.budget(n) for n, _ in pairs
    ]
    later = schedule.evicted(np.minimum(num_tokens + 1, MAX_TOKENS), prompt_lens)
    assert (evicted <= later).all()


@pytest.mark.parametrize("budget", [1 - 0.7, 0.1 + 0.2, 1 / 3, 1 / 6, 1 - 1e-6])
def test_fractions_that_floats_come_near(budget):
    """As the fraction that was meant, at all lengths; 0.3 once kept 151 of 1,400 entries."""
    fraction = read_budget("budget", budget)
    schedule = Schedule(32, 1, *fraction.as_integer_ratio())
    lengths = np.unique(np.geomspace(1, MAX_TOKENS, 3000).astype(np.int64))
    expected = [ceil(fraction * int(n)) for n in lengths]
    assert schedule.budget(lengths).tolist() == [max(1, n) for n in expected]
    assert abs(expected[-1] - budget * MAX_TOKENS) <= 1


@pytest.mark.parametrize(
    "numbers",
    [
        *((0, 1), (2**31 + 1, 1), (32, -1), (32, 2**31 + 1)),
        *((32, 1, 2, 1), (32, 1, -1, 2), (32, 1, 1, MAX_DENOMINATOR + 1), (32, 1, 1, 0)),
    ],
)
def test_numbers_that_could_overflow_are_no_schedule(numbers):
    with pytest.raises(AssertionError):
        Schedule(*numbers)


def test_narrow_arrays_are_noticed():
    schedule = Schedule(32, 1, 333_333, MAX_DENOMINATOR)
    with pytest.raises(AssertionError, match="narrower"):
        schedule.evicted(np.array([10_000], dtype=np.int32), 0)


@given(schedules(), LENGTHS, LENGTHS)
def test_evicted_is_the_definition(schedule, num_tokens, prompt_len):
    evicted = schedule.evicted(num_tokens, prompt_len)
    assert evicted == definition(schedule, num_tokens, prompt_len)
    assert evicted % schedule.page_size == 0


@given(schedules_of_users(), st.lists(st.tuples(LONG, LONG), min_size=1, max_size=9))
def test_reached_is_the_first_length_that_drops_so_much(schedule, pairs):
    """Whatever the prompt: the fewest tokens after which a compaction can have been there."""
    num_tokens, prompt_lens = np.array(pairs, dtype=np.int64).T
    evicted = schedule.evicted(num_tokens, prompt_lens)
    reached = schedule.reached(evicted)
    assert reached.tolist() == [schedule.reached(int(each)) for each in evicted]
    assert (reached <= num_tokens).all()
    for least, dropped in zip(reached.tolist(), evicted.tolist(), strict=True):
        assert schedule.evicted(least, 0) >= dropped
        assert (least == 0) == (dropped == 0)
        if dropped:
            assert schedule.evicted(least - 1, 0) < dropped


@given(schedules(), st.integers(0, 40))
def test_reached_of_any_number_of_pages(schedule, num_pages):
    """By counting."""
    dropped = num_pages * schedule.page_size
    least = schedule.reached(dropped)
    lengths = range(max(0, least - 3 * schedule.page_size), least + 1)
    first = next(n for n in lengths if schedule.evicted(n, 0) >= dropped)
    assert first == least


@given(schedules(), LENGTHS, LENGTHS)
def test_retained_lies_within_a_page_of_the_budget(schedule, num_tokens, prompt_len):
    evicted = schedule.evicted(num_tokens, prompt_len)
    budget = schedule.budget(num_tokens)
    retained = num_tokens - evicted
    if evicted:
        assert budget <= retained < budget + schedule.page_size
    elif num_tokens >= prompt_len or schedule.compress_prefill:
        assert retained < budget + schedule.page_size


@given(schedules(), LENGTHS, st.integers(0, 300))
def test_evicted_never_falls(schedule, prompt_len, start):
    values = [schedule.evicted(n, prompt_len) for n in range(start, start + 300)]
    for num_tokens, (before, after) in enumerate(pairwise(values), start + 1):
        # At most a page per decoded token, but for the one that ends the prompt.
        at_most = after if num_tokens == prompt_len else before + schedule.page_size
        assert before <= after <= at_most


@given(schedules(), st.lists(st.tuples(LENGTHS, LENGTHS), max_size=20))
def test_arrays_equal_ints(schedule, pairs):
    num_tokens, prompt_lens = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    evicted = schedule.evicted(num_tokens, prompt_lens)
    assert evicted.dtype == np.int64
    assert evicted.tolist() == [schedule.evicted(n, p) for n, p in pairs]
    budgets = schedule.budget(num_tokens)
    assert np.broadcast_to(budgets, num_tokens.shape).tolist() == [
        schedule.budget(n) for n, _ in pairs
    ]


def test_fractions_are_exact():
    """0.6 * 400 is 240; in float32 it is more, and rounding up would give 241."""
    assert ceil(float(np.float32(0.6)) * 400) == 241
    schedule = Schedule(page_size=32, minimum=1, numerator=3, denominator=5)
    assert schedule.budget(400) == 240
    assert schedule.evicted(400, 0) == 160
    assert schedule.evicted(np.array([400, 401]), 0).tolist() == [160, 160]


@pytest.mark.parametrize("num_tokens", [2**31 - 1, 2**31, 2**40 + 17])
def test_large_numbers_do_not_overflow(num_tokens):
    schedule = Schedule(page_size=32, minimum=128, numerator=999, denominator=1000)
    evicted = schedule.evicted(np.array([num_tokens]), 0)
    assert evicted.tolist() == [definition(schedule, num_tokens, 0)]


@given(schedules(), LENGTHS, st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_max_retained_bounds_every_run(schedule, prompt_len, chunks):
    """A step holds what earlier steps left, and its own tokens."""
    if not schedule.compress_prefill:
        # A chunk ends at the prompt's end, and those of the prompt may have any size.
        chunks = [prompt_len] * (prompt_len > 0) + chunks
    largest = max(chunks[1:] or [1]) if not schedule.compress_prefill else max(chunks)
    total, num_tokens, most = sum(chunks), 0, 0
    for chunk in chunks:
        most = max(most, num_tokens - schedule.evicted(num_tokens, prompt_len) + chunk)
        num_tokens += chunk
    assert most <= schedule.max_retained(total, prompt_len, largest)


def test_max_retained_is_reached():
    schedule = Schedule(page_size=32, minimum=128)
    # 159 are kept, for they are less than a page above the budget; one more is on its way.
    assert schedule.max_retained(1000, start=0, chunk=1) == 160
    assert 159 - schedule.evicted(159, 0) + 1 == 160
    assert schedule.max_retained(1000, start=700, chunk=1) == 700
    assert replace(schedule, compress_prefill=True).max_retained(1000, 700, chunk=100) == 259
    assert schedule.max_retained(90, start=0, chunk=1) == 90


@given(schedules(), st.integers(1, 2000))
def test_first_evicted_is_the_first_step_down(schedule, prompt_len):
    """Pages below it are never written, so a page too many would corrupt the prefix cache."""
    schedule = replace(schedule, compress_prefill=False)
    steps = range(prompt_len, prompt_len + 1500)
    seen = (schedule.evicted(num_tokens, prompt_len) for num_tokens in steps)
    first = next((evicted for evicted in seen if evicted), None)
    assert first is None or first == schedule.first_evicted(prompt_len)


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_cdiv(a, b):
    assert cdiv(a, b) == ceil(Fraction(a, b))
