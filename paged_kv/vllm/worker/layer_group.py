"""The layers of one metadata builder: their pages, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from paged_kv.kernels.operands import Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.policies.base import Policy
from paged_kv.store import side_data
from paged_kv.store.entries import Number
from paged_kv.store.layers import PageStore
from paged_kv.store.pages import Pages, move_entries, native_pages, packed_pages
from paged_kv.store.query_ring import QueryRing
from paged_kv.store.side_data import SideData
from paged_kv.store.spill_stores import SpillShape, SpillStores
from paged_kv.vllm.worker.layout import probe_elements, stack_layers

SharedSide = dict[tuple[int, ...], dict[str, torch.Tensor]]
"""By ordinal in the group, layers, pages, KV heads and page size: tensors as SideData has them."""


def make_stores(
    names: tuple[str, ...],
    layers: dict[str, Any],
    policy: Policy,
    layouts: Mapping[str, PageLayout],
    spilled: SpillStores[str] | None,
    side: SharedSide,
) -> list[PageStore]:
    """Stores of these layers, each of equal neighbours.

    Args:
        names: of the layers.
        layers: vLLM's Attention layers by name.
        policy: says what is kept beside the pages.
        layouts: of those with packed pages.
        spilled: what requests have spilled, if the policy spills.
        side: what lies beside pages; groups of equal stores share it, since a page of vLLM's pool
            is one group's at a time.
    """
    stores = []
    for ordinal, (part, pages) in enumerate(_pages(names, layers, layouts)):
        key = ordinal, pages.num_layers, pages.num_pages, pages.num_heads, pages.page_size
        if key not in side:
            side[key] = {
                name: torch.zeros(key[1:], dtype=side_data.DTYPES[name], device=pages.device)
                for name in side_data.names(policy)
            }
        beside, chosen = SideData(side[key]), [layers[name] for name in part]
        stores.append(_make_store(chosen, part, pages, policy, spilled, beside))
    return stores


def _make_store(
    layers: list[Any],
    names: list[str],
    pages: Pages,
    policy: Policy,
    spilled: SpillStores[str] | None,
    side: SideData,
) -> PageStore:
    first, device = layers[0], pages.device
    index = torch.arange(len(layers), device=device)
    ring = None
    if policy.observation_window:
        ring = QueryRing(len(layers), policy.observation_window)
        ring.bind((ring.window, first.num_heads, first.head_size), first.dtype, device)
    layer_ids = [extract_layer_index(name) for name in names]
    first_head = get_tensor_model_parallel_rank() * pages.num_heads
    softcap = float(getattr(first.impl, "logits_soft_cap", None) or 0.0)
    terms = Terms(float(first.impl.scale), softcap, _sinks(layers, pages.num_heads))
    store_of = None
    if spilled is not None:
        sizes = pages.keys.size, pages.values.size
        entry = SpillShape((pages.num_layers, pages.num_heads), sizes, first.dtype)
        store_of = partial(spilled.of, group=names[0], shape=entry)
    return PageStore(
        pages=pages,
        side=side,
        stack_layers=index,
        layer_ids=np.array(layer_ids),
        head_ids=np.arange(pages.num_heads) + first_head,
        terms=terms,
        ring=ring,
        ring_layers=index,
        spilled=store_of,
    )


def make_pages(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> list[Pages]:
    """The pages of these layers, of each stack of equal neighbours; see make_stores."""
    return [pages for _, pages in _pages(names, layers, layouts)]


def _pages(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> Iterator[tuple[list[str], Pages]]:
    for part, cache, elements in _caches(names, layers, layouts):
        first = layers[part[0]]
        if part[0] in layouts:
            yield part, packed_pages(cache, layouts[part[0]])
        else:
            key, value = _number(first, "_k_scale_float"), _number(first, "_v_scale_float")
            yield part, native_pages(cache, first.head_size, key, value, elements)


def movers(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> list[Callable[..., None]]:
    """Functions (source, target) that move entries in all of these layers; see move_entries."""
    return [
        packed_pages(cache, layouts[part[0]]).move
        if part[0] in layouts
        else partial(move_entries, cache, elements=elements)
        for part, cache, elements in _caches(names, layers, layouts)
    ]


def _caches(
    names: tuple[str, ...], layers: dict[str, Any], layouts: Mapping[str, PageLayout]
) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor | None]]:
    """(names, stacked caches, elements) of neighbours that one index operation serves."""
    for layout, run in groupby(names, layouts.get):
        members = list(run)
        chosen = [layers[name] for name in members]
        if layout is None:
            caches, elements = caches_of(chosen)
        else:
            caches, elements = [packed_view(layer.kv_cache) for layer in chosen], None
        start = 0
        for cache in stack_layers(caches):
            yield members[start : start + len(cache)], cache, elements
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
