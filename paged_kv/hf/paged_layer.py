"""What transformers asks of a layer whose entries are in pages."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from paged_kv.hf.masks import PagedLength

Tensor = torch.Tensor


class PagedLayer(CacheLayerMixin):
    """What transformers asks of a layer; its entries are the cache's business.

    Args:
        progress: tokens that the cache has processed, padding included; one for all layers.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, progress: list[int]) -> None:
        super().__init__()
        self.progress = progress

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Never called: PagedCache.update answers."""
        raise NotImplementedError("call PagedCache.update")

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over all tokens so far and the new ones, dropped or not."""
        return PagedLength(self.progress[0] + query_length), 0

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        """Processed tokens, padding included."""
        return self.progress[0]

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
