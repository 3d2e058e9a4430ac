"""enable: generate() of a model uses a PagedCache by itself, for as long as a context lasts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationMixin

from paged_kv.hf.cache import PagedCache
from paged_kv.hf.encoder_decoder import PagedEncoderDecoderCache
from paged_kv.hf.sequences import Sequences
from paged_kv.hf.stats import CacheStats, snapshot

_HOOK = "_prepare_cache_for_generation"  # generate() calls it once, for the cache that it will use


class Enabled:
    """What enable gives: makes the caches, and knows what the last one held.

    Args:
        model: whose caches they are.
        options: of PagedCache.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._sequences: weakref.ref[Sequences] | None = None
        self._stats: CacheStats | None = None

    def make(self) -> PagedCache | PagedEncoderDecoderCache:
        """A cache for one call of generate(). Raises ValueError: see PagedCache."""
        if self._model.config.is_encoder_decoder:
            return PagedEncoderDecoderCache(self._model, **self._options)
        return PagedCache(self._model.config, **self._options)

    def make_and_watch(self) -> PagedCache | PagedEncoderDecoderCache:
        """The same; stats() is about this one from now on."""
        cache = self.make()
        own: Any = getattr(cache, "self_attention_cache", cache)
        self._sequences, self._stats = weakref.ref(own.sequences), None
        # Finalizers run last in, first out: the pages are still held when it counts them.
        weakref.finalize(own, self._note, own.sequences)
        return cache

    def _note(self, sequences: Sequences) -> None:
        if self._sequences is not None and self._sequences() is sequences:
            self._stats = snapshot(sequences)

    def stats(self) -> CacheStats:
        """Of the last call of generate(): what its cache holds, or held at its end.

        Raises:
            ValueError: there was none.
        """
        sequences = None if self._sequences is None else self._sequences()
        found = self._stats if sequences is None or self._stats else snapshot(sequences)
        if found is None:
            raise ValueError("no generate() has made a cache since enable()")
        return found


@contextmanager
def enable(model: Any, **options: Any) -> Iterator[Enabled]:
    """Within, model.generate() uses a new PagedCache in each call, and so does what calls it.

    Calls with past_key_values, with use_cache=False, or with a cache_implementation that is not the
    model's default, get what they ask for. What is sampled, searched or streamed makes no
    difference. Contexts can be nested; the innermost counts.

    Args:
        model: with generate(); an encoder-decoder gets PagedEncoderDecoderCache.
        options: of PagedCache: policy, budget, pool, ...

    Raises:
        ValueError: as PagedCache does, before the context begins.
    """
    if getattr(type(model), _HOOK, None) is not getattr(GenerationMixin, _HOOK):
        raise ValueError(
            f"{type(model).__name__} does not make its cache as transformers' generate() does: "
            "give PagedCache(model.config, ...) as past_key_values"
        )
    enabled = Enabled(model, options)
    enabled.make().close()  # wrong options show now
    before, is_nested = getattr(model, _HOOK), _HOOK in vars(model)
    default = model.generation_config.cache_implementation

    def prepare(config: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = inputs.get("past_key_values") is not None or config.use_cache is False
        if given or config.cache_implementation not in (None, default):
            return before(config, inputs, *args, **kwargs)
        inputs["past_key_values"] = cache = enabled.make_and_watch()
        if config.is_assistant:
            cache.activate_past_recording()
        return None

    setattr(model, _HOOK, prepare)
    try:
        yield enabled
    finally:
        if is_nested:
            setattr(model, _HOOK, before)
        else:
            delattr(model, _HOOK)
