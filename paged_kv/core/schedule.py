"""The schedule: how many entries a sequence has dropped after n tokens.

A sequence is held to its budget from some number of tokens on, its start: the end of its prompt,
or where its pages were needed (NEVER before that is known).

The scheduler owns *how many* pages a request holds, the worker *which* entries survive. They agree
without talking because both compute the same pure function of integers:

    token slots  0          evicted                n
                 |  freed   | survivors and newest |  (not yet computed)
                            <----- retained ------->      budget <= retained < budget + page_size

Floats would not do: 0.6 * 400 rounds differently in float32 and float64, and a worker that is one
page behind the scheduler reads a page that already belongs to somebody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 1 << 31  # of a sequence
NEVER = 1 << 60  # the start of a sequence that is not held to its budget; int64 holds it
MAX_DENOMINATOR = 10**6  # of the fraction of its tokens that is kept


def _larger(a: Any, b: Any) -> Any:
    """max(a, b) for ints and, elementwise, for integer arrays."""
    return a + (b - a) * (b > a)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Schedule:
    """How many entries one layer of a sequence keeps.

    The budget after n tokens is ``max(minimum, ceil(n * numerator / denominator))``: a constant
    budget has numerator 0. All methods take ints or integer numpy arrays.

    Args:
        page_size: entries per page; whole pages are evicted.
        minimum: entries that are always kept.
        numerator: with denominator, the fraction of the processed tokens that is kept.
        denominator: see numerator; at most MAX_DENOMINATOR.
        compress_prefill: evict between the chunks of a prompt too, not only from its end on.
    """

    page_size: int
    minimum: int
    numerator: int = 0
    denominator: int = 1
    compress_prefill: bool = False

    def __post_init__(self) -> None:
        """No product here leaves int64: numpy would wrap without a word."""
        assert 1 <= self.page_size <= MAX_TOKENS
        assert 0 <= self.minimum <= MAX_TOKENS
        assert 0 <= self.numerator <= self.denominator <= MAX_DENOMINATOR
        assert MAX_TOKENS * MAX_DENOMINATOR < 1 << 63

    def budget(self, num_tokens: Any) -> Any:
        """Entries to keep after num_tokens tokens, at most MAX_TOKENS; arrays are of int64."""
        assert getattr(num_tokens, "dtype", "int64") == "int64", "narrower integers could overflow"
        return _larger(self.minimum, -(-self.numerator * num_tokens // self.denominator))

    def evicted(self, num_tokens: Any, start: Any) -> Any:
        """Entries dropped once num_tokens tokens are processed: a multiple of page_size.

        Never falls as num_tokens grows, for a fixed start: the budget grows by at most one per
        token.
        """
        surplus = (num_tokens - self.budget(num_tokens)) // self.page_size * self.page_size
        started = True if self.compress_prefill else num_tokens >= start
        return surplus * (surplus > 0) * started

    def reached(self, evicted: Any) -> Any:
        """The fewest tokens after which so many entries can have been dropped; 0 for none.

        Args:
            evicted: what `evicted` has returned, a multiple of page_size.
        """
        kept = self.denominator - self.numerator
        # n - ceil(n * numerator / denominator) >= evicted, solved for n; no budget of 1 drops any.
        by_fraction = -(-evicted * self.denominator // max(1, kept))
        return _larger(evicted + self.minimum, by_fraction) * (evicted > 0)

    def first_evicted(self, start: int) -> int:
        """The least that the first eviction can drop."""
        evicted: int = self.evicted(start, start)
        return max(evicted, self.page_size)

    def max_retained(self, num_tokens: int, start: int, chunk: int) -> int:
        """Most entries held at once on the way to num_tokens, in steps of at most chunk tokens.

        Without compress_prefill what comes before start is held whole, however it is chunked.
        """
        after_start: int = self.budget(num_tokens) + self.page_size - 1 + chunk
        needed = after_start if self.compress_prefill else max(start, after_start)
        return min(num_tokens, needed)
