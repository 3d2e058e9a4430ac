"""What a policy looks at, and what it decides: plain tensors, whoever holds the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, cast

import torch

from paged_kv.core.options import choice
from paged_kv.kernels import ops, reference
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.tier import Tier

Tensor = torch.Tensor
RegionIndex = tuple[Tensor, Tensor, Tensor, Tensor]
"""int64 (layer, event, KV head, slot) of entries of a region, [n] each."""
_UNREAD = cast(Tensor, None)  # policies read only what they declare, and that is there
_NO_QUERIES = cast("ObservedQueries", None)

SUM, MAX = "sum", "max"
AGGREGATION = choice(
    SUM,
    MAX,
    help="what counts of the attention of these queries, in all heads of a group: sum or max",
)


class EntryReader(Protocol):
    """Keys or values of a region of which not all are read; float32."""

    def take(self, index: RegionIndex) -> Tensor:
        """What lies there: [n, size]."""

    def of_event(self, event: int) -> Tensor:
        """All that one sequence holds: [layers, kv_heads, m, size]."""


class WholeEntries(NamedTuple):
    """The same of a tensor [layers, events, kv_heads, m, ...]."""

    tensor: Tensor

    def take(self, index: RegionIndex) -> Tensor:
        """What lies there: [n, ...]."""
        return self.tensor[index]

    def of_event(self, event: int) -> Tensor:
        """All that one sequence holds: [layers, kv_heads, m, ...]."""
        return self.tensor[:, event]


@dataclass(frozen=True)
class ObservedQueries:
    """The last queries of each sequence, the observation window; after RoPE.

    Args:
        states: float32 [layers, events, kv_heads, group, window, head_dim]; group is the number of
            query heads that share a KV head.
        positions: int64 [events, window], in any order; -1 where a sequence has had fewer queries.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        sinks: float32 [layers, 1, kv_heads, group], logits of attention sinks (gpt-oss), or None.
    """

    states: Tensor
    positions: Tensor
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Region:
    """What sequences that compact in one step hold, in some layers with equal budgets.

    Tensors lead with [layers, events, kv_heads], an event being one sequence. m is the size of the
    largest region; the others are padded at the end. Entries are in the order of their slots: by
    position until the first compaction, then in no order. Only what the policy says it reads is
    there (see Policy.reads); the rest is None.

    Args:
        num_tokens: int64 [events], tokens seen so far.
        num_entries: int64 [events], size of each region.
        num_losers: int64 [events], entries that must go, per layer and KV head.
        max_losers: the largest of num_losers, known on the host.
        max_survivors: most entries that stay of a sequence, known on the host.
        layers: int64 [layers], index of each layer in the model.
        heads: int64 [kv_heads], index of each KV head in the model (a rank has some of them).
        positions: int64 [..., m], position of the token; a merged entry has its slot's. Padding has
            the largest int64.
        keys: float32 [..., m, head_dim], after RoPE.
        values: float32 [..., m, head_dim].
        weights: float32 [..., m], tokens that an entry stands for; padding 0.
        scores: float32 [..., m], what Policy.accumulate made of the attention so far.
        ratings: float32 [..., m], what Policy.rate says of each entry.
        queries: the observation window.
        rotary: the model's RoPE.
        spilled: what each event has on a lower tier, in these layers; None: nobody spills.
        partly: keys or values by name, of which the policy reads some only (Policy.reads_partly).
    """

    num_tokens: Tensor
    num_entries: Tensor
    num_losers: Tensor
    max_losers: int
    max_survivors: int
    layers: Tensor
    heads: Tensor
    positions: Tensor
    keys: Tensor = _UNREAD
    values: Tensor = _UNREAD
    weights: Tensor = _UNREAD
    scores: Tensor = _UNREAD
    ratings: Tensor = _UNREAD
    queries: ObservedQueries = _NO_QUERIES
    rotary: Rotary | None = None
    spilled: Sequence[Tier] | None = None
    partly: Mapping[str, EntryReader] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, EntryReader]:
        """What entries hold, by name, as far as the policy reads it; without weights."""
        names = "keys", "values", "positions", "scores", "ratings"
        whole = {name: getattr(self, name) for name in names}
        tensors = {name: tensor for name, tensor in whole.items() if tensor is not None}
        return {**self.partly, **{name: WholeEntries(tensors[name]) for name in tensors}}

    @cached_property
    def valid(self) -> Tensor:
        """bool [events, 1, m]: False for padding."""
        index = torch.arange(self.positions.shape[-1], device=self.positions.device)
        return index < self.num_entries[:, None, None]

    @cached_property
    def attention(self) -> Tensor:
        """Probabilities of the observation window over the region: [..., group, window, m].

        float32; a query does not see later positions. All 0 for a query that is missing.
        """
        return reference.attention_probabilities(self._window_attention())

    @cached_property
    def attention_mass(self) -> Tensor:
        """attention, summed over group and window: [..., m]. Much faster than attention."""
        return ops.attention_mass(self._window_attention())

    @cached_property
    def largest_attention(self) -> Tensor:
        """The maximum of attention over group and window: [..., m]. Much faster than attention."""
        return ops.attention_mass(self._window_attention(), largest=True)

    def aggregated_attention(self, how: str) -> Tensor:
        """attention_mass or largest_attention, as an option AGGREGATION says."""
        return self.largest_attention if how == MAX else self.attention_mass

    def _window_attention(self) -> DenseAttention:
        queries = self.queries
        positions = queries.positions[:, None, None, :]
        terms = Terms(queries.scale, queries.softcap, queries.sinks)
        return DenseAttention(queries.states, self.keys, positions, self.positions, terms)


class Exchanged(NamedTuple):
    """Survivors that hold other entries from now on, [n] in all.

    Args:
        places: where those survivors lie.
        content: what they hold, by name, [n, head_dim] or [n].
    """

    places: RegionIndex
    content: Mapping[str, Tensor]


class Compaction(NamedTuple):
    """What a policy decided.

    Args:
        losers: bool [layers, events, kv_heads, m]; num_losers of each row, none of them padding.
        keys: float32 [..., m, head_dim], what survivors hold from now on; None if unchanged.
        values: the same for values.
        weights: float32 [..., m], tokens that survivors stand for from now on; None if unchanged.
        changed: bool [..., m], survivors that hold something else from now on.
        max_changed: the most of them in a row; None: losers plus one.
        positions: int64 [..., m], of what survivors hold from now on; None if unchanged.
        scores: float32 [..., m], theirs; None if unchanged.
        ratings: the same.
        exchanged: other survivors that change, where they are few: told one by one.
    """

    losers: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    weights: Tensor | None = None
    changed: Tensor | None = None
    max_changed: int | None = None
    positions: Tensor | None = None
    scores: Tensor | None = None
    ratings: Tensor | None = None
    exchanged: Exchanged | None = None

    def checked(self, region: Region, who: str) -> Compaction:
        """The same, with losers that the survivors can take the places of.

        Args:
            region: what was decided about.
            who: named in the error.

        Raises:
            ValueError: not num_losers of each row, or padding among them. On a GPU with memory of
                its own, for which nobody waits, an assertion of the device instead.
        """
        losers, expected = self.losers, region.num_losers[:, None]
        if losers.dtype != torch.bool or losers.shape != region.positions.shape:
            raise ValueError(
                f"{who}.compact: losers must be bool {[*region.positions.shape]}, not "
                f"{losers.dtype} {[*losers.shape]}"
            )
        counts = torch.stack([losers.sum(-1), (losers & region.valid).sum(-1)])
        right = (counts == expected).all()
        if right.device.type not in ("cpu", "mps"):  # as in store/ragged.py
            torch._assert_async(right, f"{who}.compact must name num_losers losers of each row")
        elif not right:
            found = sorted({*counts[1].flatten().tolist()})
            padding = int((counts[0] - counts[1]).sum())
            raise ValueError(
                f"{who}.compact must name num_losers losers of each row, here "
                f"{expected.flatten().tolist()} of the events; it named {found}, and "
                f"{padding} times padding"
            )
        return self

    def written_out(self, region: Region) -> Compaction:
        """The same without `exchanged`: as tensors of all that the region holds."""
        if self.exchanged is None:
            return self
        places, content = self.exchanged
        changed = torch.zeros_like(self.losers)
        changed[places] = True
        new = {name: getattr(region, name).clone() for name in content}
        for name, rows in content.items():
            new[name][places] = rows.to(new[name])
        return self._replace(**new, changed=changed, exchanged=None)


def moves(decided: Compaction, freed: Tensor, limit: int, spare: int) -> tuple[Tensor, Tensor]:
    """What to write: (source, target), int64 [layers, events, kv_heads, columns] of slots.

    Survivors of what is freed go to the losers' places; survivors that changed are written where
    they are. Only slots that stay are written: the others can be somebody else's, too. All columns
    of a row that are not needed repeat another one.

    Args:
        decided: see Compaction.
        freed: bool, broadcasts to [..., m]: slots to be freed.
        limit: the most losers of a row.
        spare: a slot that stays, in every row.
    """
    source, target = ops.pair_moves(decided.losers, freed, limit, spare)
    if decided.changed is None:
        return source, target
    size = decided.losers.shape[-1]
    most = limit + 1 if decided.max_changed is None else decided.max_changed
    places = ops.first_places(decided.changed & ~freed, min(most, size))
    unused = places == size
    source = torch.cat([source, torch.where(unused, source[..., :1], places)], -1)
    target = torch.cat([target, torch.where(unused, target[..., :1], places)], -1)
    return source, target
