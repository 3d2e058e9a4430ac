"""What a sequence has spilled: what a policy may ask of a lower tier, and what goes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Tensor = torch.Tensor
Places = tuple[Tensor, Tensor, Tensor]
"""int64 (layer, KV head, slot) of a tier, of shapes that broadcast."""


@dataclass(frozen=True)
class Spilled:
    """Entries that go down a tier.

    Args:
        row: int64 [n], layer * kv_heads + head, ascending.
        content: by name (keys, values, positions; scores and ratings, if the policy reads them),
            what they hold, [n, head_dim] or [n]; and their importance, float32 [n]: when the tier
            is full, the least important go, of equal ones the oldest.
    """

    row: Tensor
    content: dict[str, Tensor]


class Memo(NamedTuple):
    """What a sequence's compactions leave for the next one.

    Args:
        num_tokens: at the last compaction.
        looked: at the last one that looked at the tier.
        fetched: int64 [layers, kv_heads, n], positions that it fetched; -1 for none.
    """

    num_tokens: int
    looked: int
    fetched: Tensor


class Tier(Protocol):
    """What one sequence has spilled, in the layers of a region: slots [0, num_entries).

    Layers and heads are counted from 0, as in the region. What is read lies in host memory.
    """

    @property
    def page_size(self) -> int:
        """Neighbouring slots that have one summary."""

    @property
    def num_entries(self) -> int:
        """Per layer and KV head."""

    def summaries(self) -> tuple[Tensor, Tensor]:
        """Least and largest number in each channel of a page's keys.

        [layers, kv_heads, ceil(num_entries / page_size), head_dim] each.
        """

    def read(self, name: str, places: Places) -> Tensor:
        """Keys or values [..., head_dim], or numbers beside them [...], of the places' shape."""

    def recall(self) -> Memo | None:
        """What was remembered of these layers last; None: nothing yet."""

    def remember(self, memo: Memo) -> None:
        """Keeps this for the next compaction of the sequence, whatever layers that asks for."""

    def exchange(self, taken: Places, spilled: Spilled) -> None:
        """Entries leave and others come; may go on after it has returned.

        Args:
            taken: distinct places that are free from now on, [n] each, on any device.
            spilled: of each layer and KV head as many as are taken there, and some more: equally
                many everywhere.
        """
