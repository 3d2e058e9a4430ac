"""Statistics of a model's queries: what attention an entry can expect, before any query asks.

Queries before RoPE have nearly the same distribution wherever they are and whatever the text, as
"Expected Attention" observes (Devoto et al., 2510.00636). They are a model's, not a request's: they
are stored once (`paged-kv calibrate queries`), or gathered from the first tokens that are served.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.kernels.operands import Expected

Int64s = npt.NDArray[np.int64]
GATHERED = "gathered"  # in the place of a file: from the first tokens


class KnowsQueries(Protocol):
    """Has the statistics of a model's layers."""

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> Expected:
        """Those of some layers and KV heads; nobody waits for a GPU.

        Args:
            layers: int64 [layers], indices in the model.
            heads: int64 [kv_heads], indices in the model.
            device: where they are wanted.
        """
