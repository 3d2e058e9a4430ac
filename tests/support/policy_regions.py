"""Regions of random content for the tests of policies, and the same as heads for definitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import policy_heads
import torch
from policy_cases import CASES, OF_REGIONS

from paged_kv.kernels.rotary import Rotary
from paged_kv.policies import query_files
from paged_kv.policies.base import Policy
from paged_kv.policies.region import ObservedQueries, Region
from paged_kv.policies.written import ModelFacts, Written

HEAD_DIM = 8


@dataclass(frozen=True)
class Shape:
    """What a random region looks like; sizes that are not given are drawn.

    Args:
        extra: entries of each event that are free to go, more than one.
        losers: how many of them go; fewer than extra.
        dropped: tokens of each event that are gone already; 0 for a first compaction.
    """

    extra: Sequence[int] = (12, 30, 7)
    losers: Sequence[int] = (5, 22, 0)
    dropped: Sequence[int] = (0, 9, 40)
    layers: int = 2
    heads: int = 3
    group: int = 2
    softcap: float = 0.0
    sinks: bool = False
    neox: bool = True
    rotary_dim: int = HEAD_DIM


@dataclass(frozen=True)
class RandomRegion(Region):
    """A region whose definition may look at more than its policy.

    Args:
        hidden: keys and values, if they are what the ratings come from.
    """

    hidden: Mapping[str, torch.Tensor] = field(default_factory=dict)


def random_region(policy: Policy, name: str, seed: int, shape: Shape = Shape()) -> RandomRegion:
    """A region that carries what the policy reads and nothing else; padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.tensor(shape.extra) + policy.num_protected
    tokens = entries + torch.tensor(shape.dropped)
    valid = torch.arange(int(entries.max())) < entries[:, None, None]
    lead = (shape.layers, len(entries), shape.heads, int(entries.max()))

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def padded(x: torch.Tensor, value: float) -> torch.Tensor:
        return x.masked_fill(~(valid if x.ndim == 4 else valid[..., None]), value)

    positions = torch.full(lead, torch.iinfo(torch.int64).max)
    for index in range(shape.layers * len(entries) * shape.heads):
        layer, event, head = torch.unravel_index(torch.tensor(index), lead[:3])
        own = _positions(policy, int(tokens[event]), int(entries[event]), generator)
        positions[layer, event, head, : len(own)] = own
    content = {
        "keys": padded(noise(*lead, HEAD_DIM) + 0.5 * noise(HEAD_DIM), torch.nan),
        "values": padded(noise(*lead, HEAD_DIM), torch.nan),
        "weights": padded(_weights(policy, name, positions, tokens, generator), 0),
        "scores": padded(noise(*lead).abs() * 10, torch.nan),
        "rotary": _rotary(shape),
    }
    layers = torch.arange(shape.layers) * 5 + 1
    heads = torch.arange(shape.heads) + 4
    hidden = {}
    if "ratings" in policy.reads:
        hidden = {key: content[key] for key in ("keys", "values")}
        content["ratings"] = rated(policy, content, positions, layers, heads)
    return RandomRegion(
        num_tokens=tokens,
        num_entries=entries,
        num_losers=torch.tensor(shape.losers),
        max_losers=max(shape.losers),
        max_survivors=int((entries - torch.tensor(shape.losers)).max()),
        layers=layers,
        heads=heads,
        positions=positions,
        queries=_queries(policy, shape, tokens, noise),
        hidden=hidden,
        **{key: value for key, value in content.items() if key in policy.reads},
    )


def rated(policy, content, positions, layers, heads) -> torch.Tensor:
    """What the policy says of all entries, as they are; with its own file or that of regions."""
    queries = policy.query_statistics or query_files.load(Path(OF_REGIONS))
    facts = ModelFacts(content["rotary"], queries)
    # Padding has no position; whatever is computed for it, NaN comes of its key.
    seen = positions.where(positions < torch.iinfo(torch.int64).max, 0)
    entries = content["keys"], content["values"], seen, layers.numpy(), heads.numpy()
    return policy.rate(Written(*entries, facts))


def _positions(policy, num_tokens, num_entries, generator) -> torch.Tensor:
    """Sinks, recent entries and some others; in order until the first compaction."""
    if num_entries == num_tokens:
        return torch.arange(num_tokens)
    between = torch.arange(policy.num_sink_tokens, num_tokens - policy.recent_window)
    some = between[torch.randperm(len(between), generator=generator)]
    some = some[: num_entries - policy.num_protected]
    ends = torch.arange(num_tokens)
    ends = ends[(ends < policy.num_sink_tokens) | (ends >= num_tokens - policy.recent_window)]
    both = torch.cat([some, ends])
    return both[torch.randperm(len(both), generator=generator)]


def _weights(policy, name, positions, tokens, generator) -> torch.Tensor:
    """What earlier compactions left: entries that stand for several tokens, none of them exact."""
    first_recent = (tokens - policy.recent_window)[:, None, None]
    free = (positions >= policy.num_sink_tokens) & (positions < first_recent)
    several = torch.randint(1, 6, positions.shape, generator=generator)
    if CASES[name].has_accumulator:  # one in each head, from the second compaction on
        chosen = (torch.rand(positions.shape, generator=generator) * free).argmax(-1, keepdim=True)
        free = torch.zeros_like(free).scatter_(-1, chosen, True) & (positions != 0)
        several = several + 1
        first = positions.diff(dim=-1).gt(0).sum(-1, keepdim=True) + 1 >= tokens[:, None, None]
        free = free & ~first
    return torch.where(free, several, 1).float()


def _queries(policy, shape, tokens, noise) -> ObservedQueries | None:
    """The last queries, rolled as in a ring; one event misses its oldest."""
    window = policy.observation_window
    if not window:
        return None
    positions = tokens[:, None] - 1 - torch.arange(window).roll(window // 3)
    positions[-1] = torch.where(positions[-1] < tokens[-1] - window // 2 - 1, -1, positions[-1])
    states = noise(shape.layers, len(tokens), shape.heads, shape.group, window, HEAD_DIM)
    sinks = noise(shape.layers, 1, shape.heads, shape.group) if shape.sinks else None
    return ObservedQueries(states, positions.clamp_min(-1), 0.7, shape.softcap, sinks)


def _rotary(shape: Shape) -> Rotary:
    """With a scale as YaRN has."""
    half = shape.rotary_dim // 2
    return Rotary(100.0 ** (-torch.arange(half) / half), 1.2, shape.neox)


def _tables(rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin at more positions than any case has."""
    angles = np.arange(2000)[:, None] * rotary.frequencies.double().numpy()
    return rotary.scale * np.cos(angles), rotary.scale * np.sin(angles)


def select(region: RandomRegion, layers: list[int], event: int, heads: list[int]) -> RandomRegion:
    """One event, some layers and heads, without padding."""
    size = int(region.num_entries[event])

    def part(x):
        return None if x is None else x[layers][:, [event]][:, :, heads][:, :, :, :size]

    queries = region.queries
    if queries is not None:
        sinks = queries.sinks
        queries = replace(
            queries,
            states=queries.states[layers][:, [event]][:, :, heads],
            positions=queries.positions[[event]],
            sinks=None if sinks is None else sinks[layers][:, :, heads],
        )
    names = ("positions", "keys", "values", "weights", "scores", "ratings")
    return replace(
        region,
        num_tokens=region.num_tokens[[event]],
        num_entries=region.num_entries[[event]],
        num_losers=region.num_losers[[event]],
        max_losers=int(region.num_losers[event]),
        max_survivors=int(region.num_entries[event] - region.num_losers[event]),
        layers=region.layers[layers],
        heads=region.heads[heads],
        queries=queries,
        hidden={name: part(x) for name, x in region.hidden.items()},
        **{name: part(getattr(region, name)) for name in names},
    )


def heads_of(
    region: RandomRegion, num_sinks: int, recent_window: int, layer: int, event: int
) -> list[policy_heads.Head]:
    """The region's content for the definitions: the KV heads of one layer and event."""
    alone = select(region, [layer], event, list(range(len(region.heads))))
    queries, rotary = alone.queries, region.rotary
    cos, sin = _tables(rotary) if rotary else (None, None)

    def one(x, head):
        return None if x is None else x[0, 0, head].double().numpy()

    heads = [
        policy_heads.Head(
            positions=alone.positions[0, 0, head].tolist(),
            num_tokens=int(alone.num_tokens[0]),
            num_losers=int(alone.num_losers[0]),
            num_sinks=num_sinks,
            recent_window=recent_window,
            layer=int(alone.layers[0]),
            head=int(alone.heads[head]),
            keys=one(alone.hidden.get("keys", alone.keys), head),
            values=one(alone.hidden.get("values", alone.values), head),
            weights=one(alone.weights, head),
            scores=one(alone.scores, head),
            queries=one(queries and queries.states, head),
            query_positions=queries.positions[0].tolist() if queries else [],
            scale=queries.scale if queries else 1.0,
            softcap=queries.softcap if queries else 0.0,
            sinks=one(queries.sinks, head) if queries and queries.sinks is not None else None,
            cos=cos,
            sin=sin,
            neox=rotary.neox if rotary else True,
        )
        for head in range(len(region.heads))
    ]
    for head in heads:
        head.siblings = heads
    return heads
