"""What the swap copies of a worker: pages, what lies beside them, and rows of rings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paged_kv.kernels.page_layout import PageLayout
from paged_kv.store.pages import Pages
from paged_kv.vllm.swap.ring_slots import Rings
from paged_kv.vllm.worker.layer_group import make_pages
from paged_kv.vllm.worker.layout import stack_layers
from paged_kv.vllm.worker.residual import ResidualRings
from paged_kv.vllm.worker.step import Compactor


class WorkerCaches:
    """The caches of a worker's layers, as swap.needs.LayerCaches wants them.

    Args:
        layers: Attention layers by name (vLLM's static forward context).
        layouts: of those whose pages are packed.
        compactor: has side data; None without a policy.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        layouts: Mapping[str, PageLayout],
        compactor: Compactor | None,
    ) -> None:
        self.layers, self.layouts, self.compactor = layers, layouts, compactor

    def raw(self, names: tuple[str, ...]) -> Sequence[torch.Tensor]:
        """[layers, pages, ...] of equal neighbours, as they lie in memory."""
        return stack_layers([self.layers[name].kv_cache for name in names])

    def pages(self, names: tuple[str, ...]) -> Sequence[Pages]:
        """The same as keys and values."""
        return make_pages(names, {name: self.layers[name] for name in names}, self.layouts)

    def side(self, names: tuple[str, ...]) -> Sequence[torch.Tensor]:
        """[layers, pages, ...], what lies beside them."""
        compactor = self.compactor
        if compactor is None or compactor.positional or names[0] not in compactor.layers:
            return []
        stores = compactor.observer.stores_of(names)
        return [tensor for store in stores for tensor in store.side.tensors.values()]

    def layer(self, name: str) -> Any:
        """vLLM's Attention layer."""
        return self.layers[name]


def rings_of(compactor: Compactor | None, residual: ResidualRings | None) -> list[Rings]:
    """The query ring and the residual, where there are such."""
    rings = []
    if compactor is not None and compactor.policy.observation_window:
        observer = compactor.observer
        rings.append(Rings(compactor.requests, observer.row_bytes, observer.ring_rows))
    if residual is not None:
        rings.append(Rings(residual.requests, residual.row_bytes, residual.ring_rows))
    return rings
