"""Part by attention, part by age."""

from __future__ import annotations

import torch

from paged_kv.core.options import number
from paged_kv.policies.attention import Attention
from paged_kv.policies.entries import prefer_newest
from paged_kv.policies.region import Region


class Hybrid(Attention):
    """A share of entries with the most recent attention, the rest the newest.

    Like H2O (2306.14048), with the attention of the last queries instead of all: nothing needs to
    be accumulated. split_ratio of what stays is chosen by attention; the number of the newest is
    rounded.
    """

    options = {
        "split_ratio": number(0.5, 0, 1, "share that attention picks; the rest are the newest"),
        **Attention.options,
    }

    def score(self, region: Region) -> torch.Tensor:
        """float32 [..., m]: attention; the newest share of what stays beats it."""
        newest_share = 1 - self.settings["split_ratio"]
        return prefer_newest(super().score(region), region, newest_share)
