"""Statistics of a model's queries: what attention an entry can expect, before any query asks.

Queries before RoPE have nearly the same distribution wherever they are and whatever the text, as
"Expected Attention" observes (Devoto et al., 2510.00636). They are a model's, not a request's: they
are stored once (`paged-kv calibrate queries`), or gathered from the first tokens that are served.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

Tensor = torch.Tensor
Int64s = npt.NDArray[np.int64]
GATHERED = "gathered"  # in the place of a file: from the first tokens


class QueryStatistics(NamedTuple):
    """The expected logarithm of attention, a function of a key before RoPE.

    By layer, KV head, and query head of its group:

        log attention(k) = linear . k + quadratic . k^2 - normaliser

    Args:
        linear: float32 [layers, kv_heads, group, head_dim].
        quadratic: float32 [layers, kv_heads, group, head_dim].
        normaliser: float32 [layers, kv_heads, group].
    """

    linear: Tensor
    quadratic: Tensor
    normaliser: Tensor

    def log_attention(self, keys: Tensor) -> Tensor:
        """float32 [layers, events, kv_heads, group, m].

        Args:
            keys: float32 [layers, events, kv_heads, m, head_dim], before RoPE.
        """
        # One product: [layers, 1, kv_heads, group, 2 head_dim] by [layers, events, kv_heads, 2
        # head_dim, m].
        factors = torch.cat([self.linear, self.quadratic], -1)[:, None]
        powers = torch.cat([keys, keys.square()], -1)
        found: Tensor = factors @ powers.mT - self.normaliser[:, None, :, :, None]
        return found


class KnowsQueries(Protocol):
    """Has the statistics of a model's layers."""

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> QueryStatistics:
        """Those of some layers and KV heads; nobody waits for a GPU.

        Args:
            layers: int64 [layers], indices in the model.
            heads: int64 [kv_heads], indices in the model.
            device: where they are wanted.
        """
