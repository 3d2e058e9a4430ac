"""copy.deepcopy of a PagedCache: another one, which shares pages until either of them writes."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from paged_kv.hf.modes import keeps
from paged_kv.hf.paged_layer import PagedLayer
from paged_kv.hf.sequences import Sequences
from paged_kv.hf.state_of_cache import CacheState
from paged_kv.hf.step import interrupted
from paged_kv.store.query_gathering import QueryGathering


class Copyable:
    """What a PagedCache answers to the module copy, and to pickle."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """A cache of its own, which holds the same; see copy_of."""
        return copy_of(self, memo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses. Raises ValueError."""
        raise ValueError(
            f"a {type(self).__name__} cannot be pickled, nor copied without its pages, which are "
            "in a pool: PagedCache's save(path) and load(path, model.config) keep one in a file, "
            "copy.deepcopy makes another one"
        )


@keeps
def copy_of(cache: CacheState, memo: dict[int, Any]) -> Any:
    """A cache of its own, which holds the same.

    Pages and spilled entries are shared until one of the two writes to them; of transformers' own
    layers (sliding windows, linear attention) there is a copy.

    Args:
        cache: between two forward passes.
        memo: see copy.deepcopy.

    Raises:
        ValueError: it has been closed, or an error interrupted its last forward pass.
    """
    cache._check_open()
    other = like(cache)
    copy_rows(cache.sequences, other.sequences)
    other.progress[0] = cache.progress[0]
    other._owner, other._padded_at = cache._owner, cache._padded_at
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PagedLayer):
            other.layers[index] = copy.deepcopy(layer, memo)
    return other


def like(cache: CacheState) -> Any:
    """An empty cache with the same options, in the same memory if there is anything in it."""
    is_empty = cache.sequences.is_private and not cache.sequences.num_rows
    memory: dict[str, Any] = {"page_size": cache.pool.page_size} if is_empty else {}
    memory = memory or {"pool": cache.pool}
    kind: Any = type(cache)
    other = kind(cache._config, cache.compression, attention=cache._attention, **memory)
    other.sequences.is_private = cache.sequences.is_private
    return other


def copy_rows(source: Sequences, target: Sequences) -> None:
    """Rows that hold what those of another cache hold; the target has none yet.

    Raises:
        ValueError: a step of the source has not ended.
    """
    if source.step is not None:
        raise interrupted()
    arrays = ("num_tokens", "prompt_lens", "pressed", "size", "settled")
    for name in (*arrays, "tables", "ring", "residual", "spilled", "marks"):
        setattr(target, name, getattr(source, name).copy())
    target.terms, target.counters = list(source.terms), source.counters.copy()
    target.query_statistics = source.query_statistics
    if isinstance(source.query_statistics, QueryGathering):
        target.query_statistics = source.query_statistics.copy()
    for name in ("rotary", "waits_for_crop", "knows_prompts", "is_late", "num_passes"):
        setattr(target, name, getattr(source, name))
