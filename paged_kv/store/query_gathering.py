"""Query statistics gathered from tokens: those of a calibration text, or the first that are served.

Per layer, over tokens: n, sum of q, sum of q q^T of queries before RoPE, and some keys before RoPE,
among which attention is shared out. From these follows QueryStatistics:

    q ~ N(mu, C), turned by the mean rotation R over DISTANCES ahead of the key:
    log E exp(scale q . k) = scale R mu . k + scale^2 / 2 k . R C R^T k
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.base import Int64s, Policy
from paged_kv.policies.query_statistics import KnowsQueries, QueryStatistics

Tensor = torch.Tensor
DISTANCE = 2048  # between an entry and the queries that are expected: from 0 to this, on average
CONTEXT = 2048  # entries among which attention is shared out
NUM_KEYS = 256  # that stand for them
SERVED_TOKENS = 4096  # from which an engine without a file gathers them


def source(
    policy: Policy | None, first_head: int = 0, done: Callable[[], None] | None = None
) -> KnowsQueries | None:
    """Where a policy has its query statistics from: a file, or what is going to be gathered.

    None: it reads none.
    """
    if policy is None or "query_statistics" not in policy.reads:
        return None
    return policy.query_statistics or QueryGathering(SERVED_TOKENS, first_head, done)


@dataclass
class _Moments:
    """Of one layer."""

    total: Tensor  # [heads, head_dim]
    squares: Tensor  # [heads, head_dim, head_dim]
    keys: list[Tensor]  # [n, kv_heads, head_dim]


class QueryGathering:
    """Adds up queries until there are enough of them.

    Args:
        num_tokens: after so many, what was gathered stays as it is.
        first_head: index in the model of the first KV head here (a rank has some of them).
        done: called once, when there are enough.
    """

    def __init__(
        self, num_tokens: int, first_head: int = 0, done: Callable[[], None] | None = None
    ) -> None:
        self.num_tokens, self.first_head, self._done = num_tokens, first_head, done
        self.count = 0
        self._moments: dict[int, _Moments] = {}
        self._scales: dict[int, float] = {}
        self._rotary: Rotary | None = None
        self._found: dict[tuple[int, ...], QueryStatistics] = {}  # by layers

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
            self._moments[layer] = _Moments(zeros, zeros.new_zeros(heads, size, size), [])
        moments = self._moments[layer]
        moments.total += queries.sum(0)
        moments.squares += queries.transpose(0, 1).mT @ queries.transpose(0, 1)
        # Evenly over the tokens that will be looked at, whatever steps they come in.
        every = max(1, self.num_tokens // NUM_KEYS)
        moments.keys.append(keys[-self.count % every :: every].clone())

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

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> QueryStatistics:
        """See KnowsQueries; of the tokens so far."""
        chosen = tuple(layers.tolist())
        if chosen not in self._found:
            parts = [self._finish(layer, len(heads)) for layer in chosen]
            self._found[chosen] = QueryStatistics(*map(torch.stack, zip(*parts, strict=True)))
        return self._found[chosen]

    def _finish(self, layer: int, num_heads: int) -> QueryStatistics:
        """Of one layer: tensors without the first dimension."""
        total, squares, keys = vars(self._moments[layer]).values()
        assert self._rotary is not None
        rotary, scale, count = self._rotary, self._scales[layer], max(1, self.count)
        mean = total / count
        covariance = squares / count - mean[:, :, None] * mean[:, None, :]
        # The mean rotation back from a query to the key: keys are compared as if at position 0.
        cos, sin = rotary.mean(torch.zeros((), device=mean.device), DISTANCE)
        linear = rotary.turn(mean, cos, sin) * scale
        half = rotary.turn(covariance, cos, sin)  # C R^T
        quadratic = rotary.turn(half.mT, cos, sin) * (scale**2 / 2)  # R C R^T
        grouped = [part.unflatten(0, (num_heads, -1)) for part in (linear, quadratic)]
        nothing = grouped[0].new_zeros(grouped[0].shape[:2])
        found = QueryStatistics(*(part[None] for part in (*grouped, nothing)))
        states = torch.cat(keys).transpose(0, 1)  # [kv_heads, n, head_dim]
        logits = found.log_attention(states[None, None])[0, 0]  # [kv_heads, group, n]
        shared = logits.logsumexp(-1) + torch.tensor(CONTEXT / logits.shape[-1]).log()
        return QueryStatistics(grouped[0], grouped[1], shared)
