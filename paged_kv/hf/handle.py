"""What stands for a layer's keys or values in a model's forward pass, in place of tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from paged_kv.hf.masks import MaskSpec
from paged_kv.hf.opaque import Opaque
from paged_kv.hf.paged_attention import Bias
from paged_kv.kernels.operands import Terms

Tensor = torch.Tensor


class Attending(Protocol):
    """A cache that computes the attention of its layers."""

    def get_seq_length(self) -> int:
        """Tokens processed."""

    def attend(
        self,
        layer: int,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskSpec | Tensor | None,
        terms: Terms,
        bias: Bias | None,
    ) -> Tensor:
        """[rows, heads, q, size]; see PagedCache.attend."""


class Handle(Opaque):
    """Stands for the keys, or the values, of a layer: [rows, kv_heads, tokens so far, size].

    Args:
        cache: whose they are.
        layer: index in the model.
        key: the new keys, [rows, kv_heads, q, head_dim].
        value: the new values.
        is_key: which of them this stands for.
    """

    def __init__(
        self, cache: Attending, layer: int, key: Tensor, value: Tensor, is_key: bool
    ) -> None:
        self.cache, self.layer, self.key, self.value = cache, layer, key, value
        new = key if is_key else value
        total = cache.get_seq_length() + new.shape[2]
        self.shape = torch.Size((*new.shape[:2], total, new.shape[3]))
        self.dtype, self.device = new.dtype, new.device

    def size(self, dim: int | None = None) -> Any:
        """Like a tensor's."""
        return self.shape if dim is None else self.shape[dim]
