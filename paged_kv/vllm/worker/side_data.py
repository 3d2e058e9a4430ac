"""What is kept per slot and KV head beside the pages: positions, and scores and weights if used."""

from __future__ import annotations

import torch

from paged_kv.kernels.pages import Index
from paged_kv.policies.base import Policy

_DTYPES = {"positions": torch.int32, "weights": torch.float32, "scores": torch.float32}
_WHEN_WRITTEN = {"weights": 1.0, "scores": 0.0}


def names(policy: Policy) -> list[str]:
    """What a policy needs beside keys and values."""
    return [name for name in _DTYPES if name == "positions" or name in policy.reads]


def bytes_per_slot(policy: Policy) -> int:
    """Per layer and KV head."""
    return sum(_DTYPES[name].itemsize for name in names(policy))


class SideData:
    """Tensors [layers, pages, kv_heads, page_size] by name, indexed like the pages.

    Args:
        policy: says what is needed.
        shape: of each tensor.
        device: of the pages.
    """

    def __init__(self, policy: Policy, shape: tuple[int, ...], device: torch.device) -> None:
        self.tensors = {
            name: torch.zeros(shape, dtype=_DTYPES[name], device=device) for name in names(policy)
        }

    def reset(self, page: torch.Tensor, offset: torch.Tensor, positions: torch.Tensor) -> None:
        """Slots have been written: they hold these tokens and nothing is known of them.

        Args:
            page: int64 [slots], page ids.
            offset: int64 [slots].
            positions: int64 [slots].
        """
        for name, tensor in self.tensors.items():
            if name == "positions":
                tensor[:, page, :, offset] = positions.to(tensor.dtype)[:, None, None]
            else:
                tensor[:, page, :, offset] = _WHEN_WRITTEN[name]

    def read(self, name: str, index: Index) -> torch.Tensor | None:
        """float32, positions int64; None for what is not kept."""
        if name not in self.tensors:
            return None
        found = self.tensors[name][index]
        return found.long() if name == "positions" else found

    def write(self, name: str, index: Index, values: torch.Tensor) -> None:
        """Stores what read gives."""
        self.tensors[name][index] = values.to(_DTYPES[name])
