"""What a policy is: given what must give up entries, which survive, and what becomes of the rest?

The schedule has already fixed *how many* go. Of a sequence's region, the m entries it holds, a
policy names per KV head the losers, num_losers of them. The newest entries stay where they are;
survivors of the leading pages drop into the holes that losers left behind:

    slots    evicted_before     evicted_after                    num_tokens
    before   | s s . x | . x . . | x . . x | . o o o |      s sink  x survivor  . loser  o newest
    after      freed     freed   | s s x x | x o o o |

Order inside the cache does not matter: keys carry the rotation of their true positions, and every
entry is visible to every later query. A merging policy also says what the survivors hold from now
on. Nobody outside this folder knows more of a policy than this file says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.core.options import Option
from paged_kv.kernels import ops, reference
from paged_kv.model_identity import ModelShape
from paged_kv.policies.query_statistics import KnowsQueries
from paged_kv.policies.region import Compaction, Region
from paged_kv.policies.written import Written

Int64s = npt.NDArray[np.int64]
Tensor = torch.Tensor
LEAST_SCORED = 32  # queries whose attention scores are summed from before a compaction


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


class EngineFacts(NamedTuple):
    """What decides on options that a user leaves open.

    Args:
        model: its directory, or its name on the hub; empty if it is not known.
        sums_attention: whether the attention kernels sum up what each entry gets, in passing.
        shape: of the model.
    """

    model: str
    sums_attention: bool
    shape: ModelShape = ModelShape()


class Policy(ABC):
    """Picks survivors. Stateless: all it may remember is in the pages.

    Args:
        num_sink_tokens: first entries of a sequence, never dropped.
        recent_window: newest entries, never dropped.
        options: values for what the class declares in `options`.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    """The policy's own options by name."""

    evicts: ClassVar[bool] = False
    """Whether it drops entries by scores, and changes no other: another policy may wrap it."""

    wraps: ClassVar[bool] = False
    """Whether it is built around another policy, which its option `of` names."""

    is_positional: ClassVar[bool] = False
    """Whether it decides by position alone, the same in all layers and heads."""

    reads: frozenset[str] = frozenset()
    """What a region must carry besides positions: keys, values, weights, scores, ratings, rotary.

    And what `rate` is told of the model: rotary, query_statistics.
    """

    merges: bool = False
    """Whether survivors change. Then `reads` has weights, and whatever changes."""

    query_statistics: KnowsQueries | None = None
    """The model's, if they are stored; else who reads them gets what the engine gathers."""

    reads_partly: frozenset[str] = frozenset()
    """Keys or values of which it reads some entries only; they are in Region.partly."""

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.recent_window = recent_window
        defaults = {name: option.default for name, option in self.options.items()}
        self.settings = {**defaults, **(options or {})}

    @classmethod
    def settled(cls, options: Mapping[str, Any], engine: EngineFacts) -> dict[str, Any]:
        """What the options of the policy come to in an engine; each is decided there once.

        Args:
            options: of the policy, by name.
            engine: what an engine and a model allow.

        Raises:
            ValueError: an option does not fit the model.
        """
        return dict(options)

    @property
    def observation_window(self) -> int:
        """How many of the last queries the policy looks at before a compaction; 0 for none."""
        return 0

    @property
    def lead(self) -> int:
        """Last tokens of a sequence that must be seen before its first compaction; at least 1."""
        return max(1, self.observation_window, LEAST_SCORED * ("scores" in self.reads))

    @property
    def reads_wholly(self) -> frozenset[str]:
        """What a region has as tensors; an observation window is for keys."""
        asked = frozenset({"keys"}) if self.observation_window else frozenset()
        return (self.reads | asked) - self.reads_partly

    @property
    def num_protected(self) -> int:
        """Entries that no compaction may drop: a budget must be larger."""
        return self.num_sink_tokens + self.recent_window

    @abstractmethod
    def compact(self, region: Region) -> Compaction:
        """Which entries go, and what the others become."""

    @property
    def score_decay(self) -> float | None:
        """What each query leaves of the scores before it adds its own attention, in (0, 1].

        1: they are the sum of all attention. None: accumulate is the policy's own.
        """
        return None

    @property
    def kernel_decay(self) -> float | None:
        """score_decay if that is all there is to accumulate, which a kernel then does on its way.

        None: scores need a pass of their own.
        """
        return self.score_decay if type(self).accumulate is Policy.accumulate else None

    def accumulate(self, scores: Tensor, probabilities: Tensor, positions: Tensor) -> Tensor:
        """Scores after some more queries; called in every step if `reads` has scores.

        As score_decay says. Who does something else must get the same in whatever chunks they come.

        Args:
            scores: float32 [sequences, kv_heads, m]; 0 for an entry that has just been written.
            probabilities: float32 [sequences, kv_heads, group, queries, m], attention to each
                entry; 0 for entries that a query does not see and for padding.
            positions: int64 [sequences, queries] of the queries, in order; -1 for padding, which
                comes last.
        """
        if self.score_decay is None:
            raise NotImplementedError(f"{type(self).__name__} reads scores but accumulates none")
        asked = (positions >= 0)[:, None]
        return reference.fade(scores, probabilities, self.score_decay, asked)

    def rate(self, entries: Written) -> Tensor:
        """What each entry is worth, whatever else a sequence holds; kept as Region.ratings.

        Called if `reads` has ratings, at least once for every entry before a region has it. Only
        what is in `entries` may count: pages are shared, and an entry may be rated again.

        Args:
            entries: see Written.

        Returns:
            float32 [layers, events, kv_heads, m].
        """
        raise NotImplementedError(f"{type(self).__name__} reads ratings but makes none")

    @property
    def scores_key(self) -> Any:
        """Of policies with equal keys, the accumulated scores mean the same."""
        return type(self), tuple(sorted(self.settings.items()))

    def moves(self, events: Events) -> Moves:
        """Where survivors of what will be freed go, if the policy is positional: host arithmetic.

        Args:
            events: see Events.
        """
        raise NotImplementedError(f"{type(self).__name__} looks at entries")

    def protected(self, region: Region) -> Tensor:
        """bool [..., m]: sinks, recent entries and padding."""
        first_recent = (region.num_tokens - self.recent_window)[:, None, None]
        # Padding has the largest position there is.
        found = region.positions >= first_recent
        return found.logical_or_(region.positions < self.num_sink_tokens)


class ScoringPolicy(Policy):
    """Evicts: drops the entries with the lowest scores; of equal ones the oldest."""

    evicts = True

    @abstractmethod
    def score(self, region: Region) -> Tensor:
        """float32 [layers, events, kv_heads, m]: what is worth keeping has a high score.

        Leading dimensions may be 1. Values at padding, sinks and recent entries do not matter.
        """

    def compact(self, region: Region) -> Compaction:
        """num_losers of each head go."""
        return Compaction(self.losers(region, region.num_losers[:, None]))

    def losers(self, region: Region, count: Tensor, spared: Tensor | None = None) -> Tensor:
        """bool [..., m]: the `count` entries to go.

        Args:
            region: see Region.
            count: int64, broadcasts to [layers, events, kv_heads]; at most max_losers + 1.
            spared: bool [..., m], further entries that stay.
        """
        keep = self.protected(region)
        if spared is not None:
            keep = keep | spared
        scores = self.score(region).expand(region.positions.shape)
        limit = min(region.max_losers + 1, scores.shape[-1])
        return ops.lowest(scores, region.positions, keep, count, limit)


class PositionalPolicy(ScoringPolicy):
    """Decides by position alone: the engine moves entries without looking at them."""

    is_positional = True

    @abstractmethod
    def moves(self, events: Events) -> Moves:
        """Where the survivors of the pages that will be freed go."""
