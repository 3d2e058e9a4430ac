import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.policies.base import Events
from paged_kv.policies.streaming import Streaming

SINKS = st.integers(0, 100)
PAGE_SIZES = st.sampled_from([1, 4, 16, 32])


class Pages:
    """One sequence's slots, holding positions; a freed slot holds nothing."""

    FREED = -1

    def __init__(self) -> None:
        self.slots = np.empty(0, dtype=np.int64)
        self.evicted = 0

    @property
    def retained(self) -> list[int]:
        return sorted(self.slots[self.evicted :].tolist())

    def append(self, num_tokens: int) -> None:
        start = len(self.slots)
        self.slots = np.append(self.slots, np.arange(start, start + num_tokens))

    def free(self, evicted: int) -> None:
        self.slots[:evicted] = self.FREED
        self.evicted = evicted


def compact(policy: Streaming, sequences: list[Pages], evicted_after: list[int]) -> None:
    """One batch of events."""
    events = Events(
        np.array([pages.evicted for pages in sequences], dtype=np.int64),
        np.array(evicted_after, dtype=np.int64),
        np.array([len(pages.slots) for pages in sequences], dtype=np.int64),
    )
    moves = policy.moves(events)
    check_moves(events, *moves)
    for index, pages in enumerate(sequences):
        own = moves.event == index
        # Numpy reads the right side before it writes.
        pages.slots[moves.target[own]] = pages.slots[moves.source[own]]
        pages.free(evicted_after[index])


def check_moves(events: Events, event, source, target) -> None:
    assert len(event) == len(source) == len(target)
    before, after = events.evicted_before[event], events.evicted_after[event]
    assert ((before <= source) & (source < after)).all()
    assert ((after <= target) & (target < events.num_tokens[event])).all()
    # Each slot is read once and written once, and none is both: any order of copying is right.
    read = set(zip(event.tolist(), source.tolist(), strict=True))
    written = set(zip(event.tolist(), target.tolist(), strict=True))
    assert len(read) == len(written) == len(event)
    assert not read & written


def survivors(num_tokens: int, num_kept: int, num_sinks: int) -> list[int]:
    """Sinks and the newest."""
    newest = num_kept - num_sinks
    return [*range(num_sinks), *range(num_tokens - newest, num_tokens)]


def evict(num_tokens: int, budget: int, page_size: int) -> int:
    return max(0, (num_tokens - budget) // page_size * page_size)


@given(SINKS, PAGE_SIZES, st.integers(0, 100), st.lists(st.integers(1, 300), max_size=40))
def test_survivors_are_sinks_and_newest(num_sinks, page_size, recent, chunks):
    policy = Streaming(num_sinks, recent)
    budget = num_sinks + recent + page_size
    pages = Pages()
    for chunk in chunks:
        pages.append(chunk)
        num_tokens = len(pages.slots)
        evicted = evict(num_tokens, budget, page_size)
        if evicted > pages.evicted:
            compact(policy, [pages], [evicted])
        kept = num_tokens - evicted
        expected = survivors(num_tokens, kept, min(num_sinks, kept))
        assert pages.retained == expected
        assert not evicted or set(range(num_tokens - recent, num_tokens)) <= set(expected)


@st.composite
def batches(draw) -> tuple[Streaming, int, list[int]]:
    num_sinks, page_size = draw(SINKS), draw(PAGE_SIZES)
    lengths = st.integers(num_sinks + 2 * page_size, 1000)
    return Streaming(num_sinks, 0), page_size, draw(st.lists(lengths, max_size=8))


@given(batches(), st.lists(st.integers(1, 60), max_size=10))
def test_a_batch_of_sequences(batch, chunks):
    """Sequences with events of different sizes in the same step do not disturb each other."""
    policy, page_size, prompts = batch
    budget = policy.num_sink_tokens + page_size
    sequences = [Pages() for _ in prompts]
    steps = [prompts] + [[chunk + i for i in range(len(prompts))] for chunk in chunks]
    for step in steps:
        for pages, chunk in zip(sequences, step, strict=True):
            pages.append(chunk)
        due = [p for p in sequences if evict(len(p.slots), budget, page_size) > p.evicted]
        compact(policy, due, [evict(len(p.slots), budget, page_size) for p in due])
        for pages in sequences:
            num_tokens = len(pages.slots)
            kept = num_tokens - pages.evicted
            assert pages.retained == survivors(num_tokens, kept, policy.num_sink_tokens)


def test_no_events():
    empty = np.empty(0, dtype=np.int64)
    moves = Streaming(4, 32).moves(Events(empty, empty, empty))
    assert [len(array) for array in moves] == [0, 0, 0]


def test_drawn():
    """Pages of 4, two sinks, 11 tokens, budget 6: one page goes, then another at 15.

    slots   0 1 2 3   4 5 6 7   8 9 10 11
            s s 2 3 | 4 5 6 7 | 8 9 10      the sinks go to 4 and 5
    """
    pages = Pages()
    pages.append(11)
    compact(Streaming(2, 0), [pages], [4])
    assert pages.slots[4:].tolist() == [0, 1, 6, 7, 8, 9, 10]
    pages.append(4)
    compact(Streaming(2, 0), [pages], [8])
    assert pages.slots[8:].tolist() == [0, 1, 10, 11, 12, 13, 14]


def test_sinks_larger_than_a_page():
    """Pages of 4 and six sinks: those past the freed page stay where they are."""
    pages = Pages()
    pages.append(14)
    compact(Streaming(6, 0), [pages], [4])
    assert pages.slots[4:].tolist() == [4, 5, 0, 1, 2, 3, 10, 11, 12, 13]
