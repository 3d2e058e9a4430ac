"""Query statistics gathered from tokens: those of a calibration text, or the first that are served.

Per layer, over tokens: n, sums of q and q^2 of queries before RoPE, and some keys before RoPE, to
share attention out among. Queries are taken as Gaussian, with independent dimensions that have
one variance for both of a pair which RoPE turns; on their way to a key they are turned by the mean
rotation R over the distances from 0 to DISTANCE, which leaves rho of a pair's length:

    log E exp(scale q . k) = scale R mean . k + scale^2 / 2 rho^2 variance . k^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from paged_kv.kernels.operands import Expected
from paged_kv.kernels.reference import expected_logarithm
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.query_statistics import KnowsQueries

Tensor = torch.Tensor
DISTANCE = 2048  # between an entry and the queries that are expected: from 0 to this, on average
CONTEXT = 2048  # entries among which attention is shared out
NUM_KEYS = 256  # that stand for them
FIRST = 16  # position of the first query and key that count
SERVED_TOKENS = 4096  # from which an engine without a file gathers them
_SUMS = "count", "total", "squares"


def source(policy: Policy | None, done: Callable[[], None] | None = None) -> KnowsQueries | None:
    """Where a policy has its query statistics from: a file, or what is going to be gathered.

    None: it reads none.
    """
    if policy is None or "query_statistics" not in policy.reads:
        return None
    return policy.query_statistics or QueryGathering(SERVED_TOKENS, done)


@dataclass
class _Moments:
    """Of one layer."""

    count: Tensor  # [], of tokens
    total: Tensor  # [heads, head_dim]
    squares: Tensor  # [heads, head_dim]
    keys: list[Tensor]  # [n, kv_heads, head_dim]
    counted: list[Tensor]  # [n], 1 for keys that count and 0 for others


class QueryGathering:
    """Adds up queries until there are enough of them.

    Args:
        num_tokens: after so many, what was gathered stays as it is.
        done: called once, when there are enough.
    """

    def __init__(self, num_tokens: int, done: Callable[[], None] | None = None) -> None:
        self.num_tokens, self._done = num_tokens, done
        self.count = 0
        self._every = max(1, num_tokens // NUM_KEYS)
        self._moments: dict[int, _Moments] = {}
        self._scales: dict[int, float] = {}
        self._rotary: Rotary | None = None
        self._found: dict[tuple[int, ...], Expected] = {}  # by layers

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are looked at."""
        return self.count >= self.num_tokens

    def add(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        positions: Tensor,
        rotary: Rotary,
        scale: float,
    ) -> None:
        """A layer's new tokens; each layer gets all tokens of a step.

        Args:
            layer: index in the model.
            queries: [tokens, heads, head_dim], after RoPE; heads of a group are neighbours.
            keys: [tokens, kv_heads, head_dim], after RoPE.
            positions: int64 [tokens].
            rotary: the model's RoPE.
            scale: of the layer's logits.
        """
        self._rotary, self._scales[layer] = rotary, scale
        cos, sin = rotary.at(positions[:, None], back=True)
        queries, keys = (rotary.turn(part.float(), cos, sin) for part in (queries, keys))
        if layer not in self._moments:
            heads, size = queries.shape[1:]
            zeros = queries.new_zeros(heads, size)
            nothing = zeros.new_zeros(())
            self._moments[layer] = _Moments(nothing, zeros, zeros.clone(), [], [])
        moments = self._moments[layer]
        # The first tokens of a sequence, attention sinks among them, are unlike all others.
        counted = (positions >= FIRST).to(queries.dtype)
        queries = queries * counted[:, None, None]
        moments.count += counted.sum()
        moments.total += queries.sum(0)
        moments.squares += queries.square().sum(0)
        # Evenly over the tokens that will be looked at, whatever steps they come in.
        some = slice(-self.count % self._every, None, self._every)
        moments.keys.append(keys[some].clone())
        moments.counted.append(counted[some])

    @property
    def num_kv_heads(self) -> int:
        """Of the layers that have come."""
        return next(iter(self._moments.values())).keys[0].shape[1]

    def end_step(self, num_tokens: int) -> None:
        """All layers have got a step's tokens."""
        if self.is_complete:
            return
        self.count += num_tokens
        self._found.clear()
        if self.is_complete and self._done is not None:
            self._done()

    def freeze(self) -> None:
        """What was gathered so far stays as it is."""
        self.num_tokens = min(self.num_tokens, self.count)

    def copy(self) -> QueryGathering:
        """One that shares nothing with this; nobody is told when that one is complete."""
        other = QueryGathering(self.num_tokens)
        other.restore(self.state(), None)
        return other

    def state(self) -> dict[str, Tensor]:
        """What restore takes; empty before the first token."""
        rotary = self._rotary
        if rotary is None:
            return {}
        state = {
            "tokens": torch.tensor([self.num_tokens, self.count, self._every]),
            "frequencies": rotary.frequencies,
            "rotary": torch.tensor([rotary.scale, rotary.neox], dtype=torch.float64),
        }
        for layer, moments in self._moments.items():
            scale = torch.tensor(self._scales[layer], dtype=torch.float64)
            sums = {name: getattr(moments, name) for name in _SUMS}
            keys, counted = torch.cat(moments.keys), torch.cat(moments.counted)
            parts = {**sums, "keys": keys, "counted": counted, "scale": scale}
            state |= {f"{layer}.{name}": part for name, part in parts.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], device: torch.device | None) -> None:
        """Has gathered this, and nothing else; device: where it goes on, None: where this lies."""
        if not state:
            return
        self.num_tokens, self.count, self._every = state["tokens"].tolist()
        scale, neox = state["rotary"].tolist()
        self._rotary = Rotary(state["frequencies"].to(device), scale, bool(neox))
        for name in [name for name in state if name.endswith(".total")]:
            layer = name.removesuffix(".total")
            # What add changes is this one's own.
            count, total, squares = (state[f"{layer}.{each}"].to(device).clone() for each in _SUMS)
            keys, counted = (state[f"{layer}.{each}"].to(device) for each in ("keys", "counted"))
            self._moments[int(layer)] = _Moments(count, total, squares, [keys], [counted])
            self._scales[int(layer)] = float(state[f"{layer}.scale"])
        self._found.clear()

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> Expected:
        """See KnowsQueries; of the tokens so far, and of the heads that it was given."""
        chosen = tuple(layers.tolist())
        if chosen not in self._found:
            parts = [self._finish(layer, len(heads)) for layer in chosen]
            self._found[chosen] = Expected(*map(torch.stack, zip(*parts, strict=True)))
        return self._found[chosen]

    def _finish(self, layer: int, num_heads: int) -> Expected:
        """Of one layer: tensors without the first dimension."""
        moments = self._moments[layer]
        assert self._rotary is not None
        rotary, scale, count = self._rotary, self._scales[layer], moments.count.clamp_min(1)
        mean = moments.total / count
        variance = (moments.squares / count - mean.square()).clamp_min(0)
        # The mean rotation, which is the same at all distances from a query to its key.
        cos, sin = rotary.mean(torch.zeros((), device=mean.device), DISTANCE)
        # Once the scale is in them; but both queries and keys have it, in dimensions that turn.
        cos, sin = cos * rotary.scale, sin * rotary.scale
        linear = rotary.turn(mean, cos, sin) * scale
        shrunk = rotary.pair_means(variance, cos.square() + sin.square())
        quadratic = shrunk * (scale**2 / 2)
        grouped = [part.unflatten(0, (num_heads, -1)) for part in (linear, quadratic)]
        nothing = grouped[0].new_zeros(grouped[0].shape[:2])
        found = Expected(*(part[None] for part in (*grouped, nothing)))
        states = torch.cat(moments.keys).transpose(0, 1)  # [kv_heads, n, head_dim]
        counted = torch.cat(moments.counted)  # [n]
        logits = expected_logarithm(states[None, None], found)[0, 0]  # [kv_heads, group, n]
        # Of a context, as if it consisted of these keys.
        each = (CONTEXT / counted.sum().clamp_min(1)).log()
        shared = (logits + counted.log()).logsumexp(-1) + each
        return Expected(grouped[0], grouped[1], shared)
