"""What page tables and their pages hold, as tensors: to be saved, and to be held again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Arena
from paged_kv.hf.tables import PageTables

Tensor = torch.Tensor


def state_of(tables: PageTables) -> dict[str, Tensor]:
    """The pages held, each once, as they are; rows that share pages share them again.

    "ids" int64 [layers, rows, width] counts the pages of each page format from 0; "count" is that
    of the tables; "FORMAT.NAME" are numbers of the pages, [kv_heads, pages, ...], and
    "FORMAT.side.NAME" what lies beside them.
    """
    ids = np.full_like(tables.ids, -1)
    state = {"count": torch.from_numpy(tables.count.copy())}
    for arena, layers in tables.parts:
        mask = tables.ids[layers] >= 0
        pages, rank = np.unique(tables.ids[layers][mask], return_inverse=True)
        inside = np.full(mask.shape, -1, dtype=np.int64)
        inside[mask] = rank.ravel()
        ids[layers] = inside
        index = torch.from_numpy(pages).to(arena.geometry.device)
        for name, tensor in _numbers(arena).items():
            state[name] = tensor.index_select(1, index).cpu()
    state["ids"] = torch.from_numpy(ids)
    return state


def restore(tables: PageTables, state: Mapping[str, Tensor]) -> None:
    """Tables that have been bound and hold nothing hold this.

    Raises:
        PoolFull: nothing has changed.
    """
    ids = state["ids"].numpy()
    sizes = [int(ids[layers].max(initial=-1)) + 1 for _, layers in tables.parts]
    tables.pool.make_room(lambda: sum(sizes))
    tables.pool.check(sum(sizes), "a saved cache")
    tables.ids, tables.count = np.full_like(ids, -1), state["count"].numpy().copy()
    for (arena, layers), size in zip(tables.parts, sizes, strict=True):
        if not size:
            continue
        tables.need(arena, size)
        pages = _free(arena, size)
        arena.allocator.take(pages)
        ranks = ids[layers]
        tables.ids[layers] = np.where(ranks >= 0, pages[ranks], -1)
        shares = np.bincount(ranks[ranks >= 0], minlength=size) - 1
        arena.allocator.share(np.repeat(pages, shares))
        index = torch.from_numpy(pages).to(arena.geometry.device)
        for name, tensor in _numbers(arena).items():
            if name in state:  # another cache of the pool may have more beside its pages
                tensor[:, index] = state[name].to(tensor.device)
    tables.changed(may_share=True)


def _numbers(arena: Arena) -> dict[str, Tensor]:
    name = arena.geometry.page_format
    side = {f"{name}.side.{key}": tensor for key, tensor in arena.side.items()}
    return side | {f"{name}.{key}": tensor for key, tensor in arena.content.items()}


def _free(arena: Arena, count: int) -> Int64s:
    """Free pages, neighbours if possible: what were neighbours are neighbours again."""
    runs = arena.allocator.find_runs(1, count)
    return arena.allocator.find_free(count) if runs is None else runs[0] + np.arange(count)
