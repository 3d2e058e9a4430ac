"""The layers of one metadata builder: their pages, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from paged_kv.kernels.packed_pages import PackedPages
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.kernels.pages import Number, Pages
from paged_kv.kernels.reference import move_entries
from paged_kv.policies.base import Policy
from paged_kv.vllm.worker.layout import probe_elements, stack_layers
from paged_kv.vllm.worker.side_data import SideData


class Stack:
    """Equal layers whose pages lie evenly in memory: one index operation serves all.

    Args:
        names: of the layers.
        layers: vLLM's Attention layers.
        pages: of these layers.
        policy: says what is kept beside the pages.
    """

    def __init__(
        self, names: list[str], layers: list[Any], pages: Pages | PackedPages, policy: Policy
    ) -> None:
        first, device = layers[0], pages.device
        self.pages = pages
        self.dtype: torch.dtype = first.dtype  # the model's
        shape = (pages.num_layers, pages.num_pages, pages.num_heads, pages.page_size)
        self.side = SideData(policy, shape, device)
        self.ring = None  # [layers, rows, window, query heads, head_dim]: token t at t % window
        self.ring_rows: list[torch.Tensor] = []  # the same memory: [rows * window, ...] by layer
        if policy.observation_window:
            size = (len(layers), 0, policy.observation_window, first.num_heads, first.head_size)
            self.ring = torch.zeros(size, dtype=first.dtype, device=device)
        self.layer_ids = torch.tensor([extract_layer_index(name) for name in names], device=device)
        first_head = get_tensor_model_parallel_rank() * pages.num_heads
        self.head_ids = torch.arange(pages.num_heads, device=device) + first_head
        impl = first.impl
        self.scale = float(impl.scale)
        self.softcap = float(getattr(impl, "logits_soft_cap", None) or 0.0)
        self.sinks = _sinks(layers, pages.num_heads)

    def make_room(self, num_rows: int) -> None:
        """Gives the ring at least so many rows."""
        if self.ring is not None and self.ring.shape[1] < num_rows:
            more = num_rows - self.ring.shape[1]
            self.ring = torch.nn.functional.pad(self.ring, (0, 0, 0, 0, 0, 0, 0, more))
            self.ring_rows = list(self.ring.flatten(1, 2))

    def grouped(self, queries: torch.Tensor) -> torch.Tensor:
        """float32 [..., kv_heads, group, queries, head_dim] of [..., queries, heads, head_dim]."""
        heads = queries.unflatten(-2, (self.pages.num_heads, -1)).float()
        return heads.movedim(-4, -2)


def make_stacks(
    names: tuple[str, ...],
    layers: dict[str, Any],
    policy: Policy,
    layouts: Mapping[str, PageLayout],
) -> list[Stack]:
    """The stacks of these layers; see Stack. layouts: of those with packed pages."""
    return [
        Stack(part, [layers[name] for name in part], pages, policy)
        for part, pages in _pages(names, layers, layouts)
    ]


def make_pages(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> list[Pages | PackedPages]:
    """The pages of these layers, of each stack; see make_stacks."""
    return [pages for _, pages in _pages(names, layers, layouts)]


def _pages(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> Iterator[tuple[list[str], Pages | PackedPages]]:
    for part, cache, elements in _caches(names, layers, layouts):
        first = layers[part[0]]
        if part[0] in layouts:
            yield part, PackedPages(cache, layouts[part[0]])
        else:
            key, value = _number(first, "_k_scale_float"), _number(first, "_v_scale_float")
            yield part, Pages(cache, first.head_size, key, value, elements)


def movers(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> list[Callable[..., None]]:
    """Functions (source, target) that move entries in all of these layers; see move_entries."""
    return [
        PackedPages(cache, layouts[part[0]]).move
        if part[0] in layouts
        else partial(move_entries, cache, elements=elements)
        for part, cache, elements in _caches(names, layers, layouts)
    ]


def _caches(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor | None]]:
    """(names, stacked caches, elements) of neighbours that one index operation serves."""
    for layout, run in groupby(names, layouts.get):
        own = list(run)
        chosen = [layers[name] for name in own]
        if layout is None:
            caches, elements = caches_of(chosen)
        else:
            caches, elements = [packed_view(layer.kv_cache) for layer in chosen], None
        start = 0
        for cache in stack_layers(caches):
            yield own[start : start + len(cache)], cache, elements
            start += len(cache)


def packed_view(cache: torch.Tensor) -> torch.Tensor:
    """uint8 [pages, kv_heads, block_bytes] of a layer's cache."""
    return cache.view(torch.uint8).view(*cache.shape[:2], -1)  # never a copy


def caches_of(layers: list[Any]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Caches as Pages takes them, and where an entry lies in a page (None: see Pages)."""
    caches = [layer.kv_cache for layer in layers]
    if caches[0].device.type != "cpu":
        return caches, None
    return [cache.flatten(2) for cache in caches], probe_elements(layers[0], caches[0])


def row_bytes(layers: list[Any], policy: Policy) -> int:
    """Memory of one row of the query ring in these layers."""
    numbers = (layer.num_heads * layer.head_size * layer.dtype.itemsize for layer in layers)
    return policy.observation_window * sum(numbers)


def _number(layer: Any, scale: str) -> Number:
    """What the elements of a layer's cache mean."""
    dtype = layer.kv_cache.dtype
    name = layer.kv_cache_dtype
    if not is_quantized_kv_cache(name):
        return Number(dtype)
    eight_bits = torch.float8_e5m2 if name == "fp8_e5m2" else current_platform.fp8_dtype()
    return Number(eight_bits, float(getattr(layer, scale)))


def _sinks(layers: list[Any], num_kv_heads: int) -> torch.Tensor | None:
    sinks: list[Any] = [getattr(layer.impl, "sinks", None) for layer in layers]
    if sinks[0] is None:
        return None
    return torch.stack(sinks).float().unflatten(1, (num_kv_heads, -1))[:, None]
