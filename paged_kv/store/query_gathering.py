"""Query statistics gathered from tokens: those of a calibration text, or the first that are served.

Per layer, over tokens: n, sums of q and q^2 of queries before RoPE, and keys before RoPE, to share
attention out among. Queries are taken as Gaussian, with independent dimensions that have one
variance for both of a pair which RoPE turns; on their way to a key they are turned by the mean
rotation R over the distances from 0 to DISTANCE, which leaves rho of a pair's length:

    log E exp(scale q . k) = scale R mean . k + scale^2 / 2 rho^2 variance . k^2

The normaliser is the logarithm of the sum of that over the keys of a context, averaged over
contexts. In some heads few keys take nearly all: the fewer keys stand for a context, the more of
those are missed, and the smaller the normaliser comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from paged_kv.kernels.operands import Expected
from paged_kv.kernels.reference import expected_logarithm
from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.query_statistics import KnowsQueries

Tensor = torch.Tensor
DISTANCE = 2048  # between an entry and the queries that are expected: from 0 to this, on average
CONTEXT = 2048  # tokens among whose entries attention is shared out
FIRST = 16  # position of the first query and key that count
SERVED_TOKENS = 4096  # from which an engine without a file gathers them
NUM_KEYS = 1024  # that it keeps of them until then


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
    keys: Tensor  # [n, kv_heads, head_dim]
    counted: Tensor  # [n], 1 for keys that count and 0 for others
    normaliser: Tensor | None = None  # [kv_heads, group], made when all tokens have come

    def add_keys(self, keys: Tensor, counted: Tensor) -> None:
        """Behind those that are there."""
        self.keys = torch.cat([self.keys, keys.to(self.keys.dtype)])
        self.counted = torch.cat([self.counted, counted])


class QueryGathering:
    """Adds up queries until there are enough of them.

    Args:
        num_tokens: after so many, what was gathered stays as it is.
        done: called once, when there are enough.
        num_keys: most that are kept, in the dtype that they come in.
    """

    def __init__(
        self, num_tokens: int, done: Callable[[], None] | None = None, num_keys: int = NUM_KEYS
    ) -> None:
        self.num_tokens, self._done = num_tokens, done
        self.count = 0
        self._every = -(-num_tokens // num_keys)
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
        if layer not in self._moments:
            zeros = queries.new_zeros(queries.shape[1:], dtype=torch.float32)
            nothing = zeros.new_zeros(()), zeros, zeros.clone()
            self._moments[layer] = _Moments(*nothing, keys[:0], zeros.new_zeros(0))
        moments = self._moments[layer]
        cos, sin = rotary.at(positions[:, None], back=True)
        queries, keys = (rotary.turn(part.float(), cos, sin) for part in (queries, keys))
        # The first tokens of a sequence, attention sinks among them, are unlike all others.
        counted = (positions >= FIRST).to(queries.dtype)
        queries = queries * counted[:, None, None]
        moments.count += counted.sum()
        moments.total += queries.sum(0)
        moments.squares += queries.square().sum(0)
        # Evenly over the tokens that will be looked at, whatever steps they come in.
        some = slice(-self.count % self._every, None, self._every)
        moments.add_keys(keys[some], counted[some])

    @property
    def num_kv_heads(self) -> int:
        """Of the layers that have come."""
        return next(iter(self._moments.values())).keys.shape[1]

    def end_step(self, num_tokens: int) -> None:
        """All layers have got a step's tokens."""
        if self.is_complete:
            return
        self.count += num_tokens
        self._found.clear()
        if not self.is_complete:
            return
        self._forget_keys()
        if self._done is not None:
            self._done()

    def freeze(self) -> None:
        """What was gathered so far stays as it is."""
        if not self.is_complete:
            self.num_tokens = self.count
            self._forget_keys()

    def _forget_keys(self) -> None:
        """They have told what they are for."""
        for layer, moments in self._moments.items():
            moments.normaliser = self._finish(layer).normaliser
            moments.keys, moments.counted = moments.keys[:0].clone(), moments.counted[:0].clone()

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
            parts = {**vars(moments), "scale": scale}
            state |= {f"{layer}.{name}": part for name, part in parts.items() if part is not None}
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
            found = {each.name: state.get(f"{layer}.{each.name}") for each in fields(_Moments)}
            parts = {each: part for each, part in found.items() if part is not None}
            # What add changes is this one's own.
            own = {each: part.to(device).clone() for each, part in parts.items()}
            self._moments[int(layer)] = _Moments(**own)
            self._scales[int(layer)] = float(state[f"{layer}.scale"])
        self._found.clear()

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> Expected:
        """See KnowsQueries; of the tokens so far, and of the heads that it was given."""
        chosen = tuple(layers.tolist())
        if chosen not in self._found:
            assert len(heads) == self.num_kv_heads
            parts = [self._finish(layer) for layer in chosen]
            self._found[chosen] = Expected(*map(torch.stack, zip(*parts, strict=True)))
        return self._found[chosen]

    def _finish(self, layer: int) -> Expected:
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
        linear, quadratic = (
            part.unflatten(0, (self.num_kv_heads, -1)) for part in (linear, quadratic)
        )
        if moments.normaliser is not None:
            return Expected(linear, quadratic, moments.normaliser)
        found = Expected(linear, quadratic, linear.new_zeros(linear.shape[:2]))
        return found._replace(normaliser=self._normaliser(moments, found))

    def _normaliser(self, moments: _Moments, found: Expected) -> Tensor:
        """[kv_heads, group]; found: without one."""
        found = Expected(*(part[None] for part in found))
        total, most = moments.counted.sum().clamp_min(1), -(-CONTEXT // self._every)
        result = torch.zeros_like(found.normaliser[0])
        contexts = zip(moments.keys.split(most), moments.counted.split(most), strict=True)
        for keys, counted in contexts:
            states = keys.float().transpose(0, 1)  # [kv_heads, n, head_dim]
            logits = expected_logarithm(states[None, None], found)[0, 0]  # [kv_heads, group, n]
            count = counted.sum()
            # Of a context, as if it consisted of these keys; of first tokens only: nothing.
            shared = (logits + counted.log()).logsumexp(-1) + (CONTEXT / count.clamp_min(1)).log()
            result += shared.nan_to_num(neginf=0) * count / total
        return result
