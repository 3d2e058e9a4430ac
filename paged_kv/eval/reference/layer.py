"""From what layers hold to what a policy sees, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from paged_kv.eval.reference.layer_cache import LayerCache, Window
from paged_kv.eval.reference.packing import Packing
from paged_kv.kernels.operands import Terms
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.entries import take
from paged_kv.policies.region import Compaction, ObservedQueries, Region
from paged_kv.tiers.spill_memory import SpillSpace
from paged_kv.tiers.spill_store import SpillStore

Tensor = torch.Tensor
FIELDS = ("keys", "values", "positions", "weights", "scores")  # of a cache that compacts
_PACKED = ("keys", "values")
_NOT_HELD = {"rotary", "query_statistics", "ratings"}  # see rating.py


@dataclass
class Layer:
    """One layer of one sequence.

    Args:
        index: in the model.
        window: its last queries.
        packing: how its entries are stored.
        cache: its entries, as they are read.
        terms: how it computes attention; known from the first chunk on.
        spilled: what it has spilled; None: nothing yet.
    """

    index: int
    window: Window
    packing: Packing = field(default_factory=Packing)
    cache: LayerCache = field(default_factory=LayerCache)
    terms: Terms = field(default_factory=lambda: Terms(1.0))
    spilled: SpillStore | None = None

    def alike(self, num_losers: int, apart: bool) -> Alike:
        """What must be equal for layers to share a region; apart: no two do."""
        shape, terms = tuple(self.cache["keys"].shape), self.terms
        index = self.index if apart else 0
        return Alike(num_losers, shape, terms.scale, terms.softcap, terms.sinks is not None, index)

    def spill_to(self, space: SpillSpace) -> None:
        """Has a store from now on."""
        if self.spilled is None:
            keys, values = self.cache["keys"], self.cache["values"]
            sizes = keys.shape[-1], values.shape[-1]
            self.spilled = SpillStore((1, len(keys)), sizes, keys.dtype, space)

    def copy(self, scores: str = "scores") -> Layer:
        """One that shares nothing with this; scores: which field of the cache it has as that."""
        fields = {name: name for name in FIELDS} | {"scores": scores}
        return Layer(
            self.index,
            self.window.copy(),
            self.packing.copy(),
            self.cache.copy(**fields) if self.cache.size else LayerCache(),
            self.terms,
            None if self.spilled is None else self.spilled.copy(),
        )


class Alike(NamedTuple):
    """Layers with equal values compact together."""

    num_losers: int
    shape: tuple[int, ...]  # of the keys: [kv_heads, m, head_dim]
    scale: float
    softcap: float
    has_sinks: bool
    layer: int  # its index, if each spills for itself


def make_region(
    layers: Sequence[Layer],
    num_tokens: int,
    num_losers: int,
    reads: frozenset[str],
    observation_window: int,
    rotary: Callable[[], Rotary],
) -> Region:
    """What layers that are alike hold, as a policy sees it: one event.

    Args:
        layers: of one sequence.
        num_tokens: seen so far.
        num_losers: entries that must go.
        reads: see Policy.reads.
        observation_window: last queries that the policy looks at.
        rotary: makes the model's RoPE tables.
    """
    fields: dict[str, Any] = {name: stack(layers, name) for name in sorted(reads - _NOT_HELD)}
    if observation_window:
        fields["queries"] = _queries(layers, num_tokens, observation_window)
    stores = [layer.spilled for layer in layers if layer.spilled is not None]
    positions = stack(layers, "positions")

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=positions.device)

    return Region(
        num_tokens=integers(num_tokens),
        num_entries=integers(positions.shape[-1]),
        num_losers=integers(num_losers),
        max_losers=num_losers,
        max_survivors=positions.shape[-1] - num_losers,
        layers=integers(*(layer.index for layer in layers)),
        heads=torch.arange(positions.shape[2], device=positions.device),
        positions=positions,
        **fields,
        rotary=rotary() if "rotary" in reads else None,
        spilled=[store.select([0]) for store in stores] or None,
    )


def stack(layers: Sequence[Layer], name: str) -> Tensor:
    """[layers, 1, kv_heads, m, ...]; of one layer what it holds, not a copy."""
    if len(layers) == 1 and layers[0].cache[name].is_contiguous():
        return layers[0].cache[name][None, None]
    return torch.stack([layer.cache[name] for layer in layers])[:, None]


def _queries(layers: Sequence[Layer], num_tokens: int, window: int) -> ObservedQueries:
    keys, terms = layers[0].cache["keys"], layers[0].terms
    positions = torch.arange(num_tokens - window, num_tokens, device=keys.device).clamp_min(-1)
    states = torch.stack([layer.window.last(positions) for layer in layers])
    states = states.unflatten(1, (len(keys), -1))[:, None]
    sinks = None
    if terms.sinks is not None:
        layer_sinks = [layer.terms.sinks for layer in layers if layer.terms.sinks is not None]
        sinks = torch.stack(layer_sinks).view(len(layer_sinks), 1, len(keys), -1)
    return ObservedQueries(states, positions[None], terms.scale, terms.softcap, sinks)


def apply(layers: Sequence[Layer], num_losers: int, result: Compaction) -> None:
    """Layers that are alike hold the survivors from now on."""
    kv_heads, num_entries = layers[0].cache["positions"].shape
    size = num_entries - num_losers
    kept = ~result.losers[:, 0]  # [layers, kv_heads, m]
    index = kept.nonzero()[:, -1].view(len(layers), kv_heads, size)
    for row, layer in enumerate(layers):
        fields = {}
        for name in FIELDS:
            new = getattr(result, name)
            before = layer.cache[name] if new is None else new[row, 0]
            if new is not None and name in _PACKED and not layer.packing.is_native:
                assert result.changed is not None
                stored = layer.packing.stored(name, before)
                before = torch.where(result.changed[row, 0, ..., None], stored, layer.cache[name])
            fields[name] = take(before, index[row])
        layer.cache.replace(size, **fields)
