"""What is kept per slot and KV head beside the pages: positions, and what else a policy reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paged_kv.kernels.index import Index
from paged_kv.policies.base import Policy
from paged_kv.store.entries import whole_pages

Tensor = torch.Tensor
DTYPES = {
    "positions": torch.int32,
    "weights": torch.float32,
    "scores": torch.float32,
    "ratings": torch.float32,
}
_WHEN_WRITTEN = {"weights": 1.0, "scores": 0.0}  # ratings are made before they are read


def names(policy: Policy | None) -> list[str]:
    """What a policy needs beside keys and values."""
    if policy is None:
        return []
    return [name for name in DTYPES if name == "positions" or name in policy.reads]


def bytes_per_slot(policy: Policy) -> int:
    """Per layer and KV head."""
    return sum(DTYPES[name].itemsize for name in names(policy))


class SideData:
    """Tensors by name, indexed like the pages.

    Args:
        tensors: [layers, pages, kv_heads, page_size] each, of the dtypes in DTYPES.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def reset(self, page: Tensor, offset: Tensor, positions: Tensor) -> None:
        """Slots have been written, in all layers: nothing is known of them but their tokens.

        Args:
            page: int64 [slots], page ids.
            offset: int64 [slots].
            positions: int64 [slots].
        """
        for name, tensor in self.tensors.items():
            if name == "positions":
                tensor[:, page, :, offset] = positions.to(tensor.dtype)[:, None, None]
            elif name in _WHEN_WRITTEN:
                tensor[:, page, :, offset] = _WHEN_WRITTEN[name]

    def gather(self, name: str, layers: Tensor, pages: Tensor) -> Tensor:
        """Of whole pages: [layers, sequences, kv_heads, n * page_size]; positions are int64.

        Args:
            name: see names.
            layers: int64 [layers].
            pages: int64 [sequences, n], page ids; or [layers, sequences, n].
        """
        values = whole_pages(self.tensors[name], layers, pages)
        return values.long() if name == "positions" else values

    def move(self, source: Index, target: Index) -> None:
        """Copies between slots, all read before any is written."""
        for tensor in self.tensors.values():
            tensor[target] = tensor[source]

    def store(self, name: str, index: Index, values: Tensor, changed: Tensor | None = None) -> None:
        """Stores what gather gives; see Entries.store."""
        tensor = self.tensors[name]
        new = values.to(tensor.dtype)
        tensor[index] = new if changed is None else torch.where(changed, new, tensor[index])
