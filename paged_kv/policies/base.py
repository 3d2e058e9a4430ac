"""What a policy is: given the rows of a batch that must give up pages, where do the survivors go?

The schedule has already fixed *how many* entries go: evicted rises from `evicted_before` to
`evicted_after`. The newest entries stay where they are. A policy names the losers; survivors of the
leading pages drop into the holes that losers left behind:

    slots    evicted_before     evicted_after                    num_tokens
    before   | s s . x | . x . . | x . . x | . o o o |      s sink  x survivor  . loser  o newest
    after      freed     freed   | s s x x | x o o o |

Order inside the cache does not matter: keys carry the rotation of their true positions, and every
entry is visible to every later query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """Sequences of one layer group that compact in this step; arrays of shape [num_events].

    Slots are logical: slot i of a sequence is where its token i was written.
    """

    evicted_before: Int64s
    evicted_after: Int64s
    num_tokens: Int64s


class Moves(NamedTuple):
    """Entries to copy, all read before any is written; arrays of shape [num_moves]."""

    event: Int64s  # index into Events
    source: Int64s  # logical slot, < evicted_after
    target: Int64s  # logical slot, >= evicted_after


class Policy(ABC):
    """Picks survivors. Stateless: all it may remember is in the pages.

    Args:
        num_sink_tokens: first entries of a sequence, never dropped.
        recent_window: newest entries, never dropped.
        options: values for what the class declares in `options`.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    """Names and defaults of the policy's own options."""

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.recent_window = recent_window
        self.settings = {**self.options, **(options or {})}

    @abstractmethod
    def moves(self, events: Events) -> Moves:
        """Where the survivors of the pages that will be freed go."""
