"""Entries as they were written: what a policy rates them by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.kernels.rotary import Rotary
from paged_kv.policies.query_statistics import KnowsQueries

Tensor = torch.Tensor
Int64s = npt.NDArray[np.int64]


class ModelFacts(NamedTuple):
    """What an engine knows of its model; None where no policy asks.

    Args:
        rotary: the model's RoPE.
        queries: statistics of its queries.
    """

    rotary: Rotary | None = None
    queries: KnowsQueries | None = None


NO_FACTS = ModelFacts()


class Written(NamedTuple):
    """Some entries of some sequences, as pages store them; padding may be anything.

    Args:
        keys: float32 [layers, events, kv_heads, m, head_dim], after RoPE.
        values: float32 [layers, events, kv_heads, m, size].
        positions: int64, broadcasts to [layers, events, kv_heads, m].
        layers: int64 [layers], index of each layer in the model; on the host, as heads.
        heads: int64 [kv_heads], index of each KV head in the model.
        facts: of the model.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    layers: Int64s
    heads: Int64s
    facts: ModelFacts
