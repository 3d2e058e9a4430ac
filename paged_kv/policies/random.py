"""Chance: what every policy that looks at anything must beat."""

from __future__ import annotations

from math import inf

import torch

from paged_kv.core.options import integer
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region

STEP = 0x9E3779B97F4A7C15


class Random(ScoringPolicy):
    """Random entries, the same ones in every run (a baseline).

    The score is a hash (splitmix64) of the seed, the layer, the KV head and the position: integers
    only, so that neither the batch nor the rank that holds a head changes it.
    """

    options = {"seed": integer(0, most=inf, help="of the random numbers")}

    def score(self, region: Region) -> torch.Tensor:
        """24 bits of the hash: float32 holds them exactly."""
        state = torch.full_like(region.positions, _signed(self.settings["seed"]))
        for part in (region.layers[:, None, None, None], region.heads[:, None], region.positions):
            state = _mix(state + part)
        return _shifted(state, 40).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One step of splitmix64; int64 arithmetic wraps like that of unsigned numbers."""
    x = x + _signed(STEP)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
