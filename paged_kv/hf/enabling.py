"""enable: generate() of a model uses a PagedCache by itself, for as long as a context lasts.

Which models do is known here, not in them: a copy of a model is not enabled, and generate() of all
others makes the cache that it always makes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import unwrap
from typing import Any

from transformers import GenerationMixin

from paged_kv.hf import compat
from paged_kv.hf.cache import PagedCache
from paged_kv.hf.encoder_decoder import PagedEncoderDecoderCache
from paged_kv.hf.once import once
from paged_kv.hf.sequences import Sequences
from paged_kv.hf.stats import CacheStats

_HOOK = "_prepare_cache_for_generation"  # generate() calls it once, for the cache that it will use
_lock = threading.Lock()
_enabled: weakref.WeakKeyDictionary[Any, list[Enabled]] = weakref.WeakKeyDictionary()  # by model


class Enabled:
    """What enable gives: makes the caches, and knows what the last one held.

    Args:
        model: whose caches they are.
        options: of PagedCache.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._default = model.generation_config.cache_implementation
        self._sequences: weakref.ref[Sequences] | None = None
        self._stats: CacheStats | None = None

    def make(self) -> PagedCache | PagedEncoderDecoderCache:
        """A cache for one call of generate(). Raises ValueError: see PagedCache."""
        if self._model.config.is_encoder_decoder:
            return PagedEncoderDecoderCache(self._model, **self._options)
        return PagedCache(self._model.config, **self._options)

    def is_meant(self, config: Any, inputs: dict[str, Any]) -> bool:
        """Whether a call of generate() with this generation config leaves its cache to us."""
        is_chosen = inputs.get(compat.cache_argument()) is not None or config.use_cache is False
        return not is_chosen and config.cache_implementation in (None, self._default)

    def make_and_watch(self) -> PagedCache | PagedEncoderDecoderCache:
        """The same; stats() is about this one from now on."""
        cache = self.make()
        paged_cache: Any = getattr(cache, "self_attention_cache", cache)
        self._sequences, self._stats = weakref.ref(paged_cache.sequences), None
        # Finalizers run last in, first out: the pages are still held when it counts them.
        weakref.finalize(paged_cache, self._note, paged_cache.sequences)
        return cache

    def _note(self, sequences: Sequences) -> None:
        if self._sequences is not None and self._sequences() is sequences:
            self._stats = sequences.stats()

    def stats(self) -> CacheStats:
        """Of the last call of generate(): what its cache holds, or held at its end.

        Raises:
            ValueError: there was none.
        """
        sequences = None if self._sequences is None else self._sequences()
        stats = self._stats if sequences is None or self._stats else sequences.stats()
        if stats is None:
            raise ValueError("no generate() has made a cache since enable()")
        return stats


@contextmanager
def enable(model: Any, **options: Any) -> Iterator[Enabled]:
    """Within, model.generate() uses a new PagedCache in each call, and so does what calls it.

    Calls with past_key_values, with use_cache=False, or with a cache_implementation that is not the
    model's default, get what they ask for, except "paged", a ValueError. What is sampled, searched
    or streamed makes no difference. Contexts can be nested, and overlap in threads; the last that
    began counts.

    Args:
        model: with generate(); an encoder-decoder gets PagedEncoderDecoderCache. Of a wrapper that
            hands on what it does not know (torch.compile, PEFT), the model inside.
        options: of PagedCache: policy, budget, pool, ...

    Raises:
        ValueError: as PagedCache does, before the context begins.
    """
    _install()
    model = _owner_of(model)
    enabled = Enabled(model, options)
    enabled.make().close()  # wrong options show now
    with _lock:
        _enabled.setdefault(model, []).append(enabled)
    try:
        yield enabled
    finally:
        with _lock:
            _enabled[model].remove(enabled)


def _owner_of(model: Any) -> Any:
    """The model whose cache generate() makes: this one, or that in a wrapper.

    Raises:
        ValueError: no cache is made for it where transformers' generate() makes one.
    """
    hook: Any = getattr(model, _HOOK, None)
    if getattr(hook, "__func__", None) is not getattr(GenerationMixin, _HOOK):
        raise ValueError(
            f"{type(model).__name__} does not make its cache as transformers' generate() does: "
            "enable the model inside, or give PagedCache(model.config, ...) as past_key_values"
        )
    owner = hook.__self__
    if not _reaches_hook(type(owner)):
        raise ValueError(
            f"{type(owner).__name__}.generate() does not end in transformers' own generate(): "
            "enable the model inside whose generate() it calls (often model.language_model), or "
            "give a PagedCache of its config as past_key_values"
        )
    return owner


def _reaches_hook(kind: type) -> bool:
    """Whether generate() of a class makes its cache by our hook, for the same object.

    Its own may be another model's (BLIP-2); or go on to that of a base class, in whatever method
    (Whisper); or call the hook itself (Dia). What its methods name tells.
    """
    bases = {base.__name__ for base in kind.__mro__} | {"super"}
    for base in kind.__mro__[: kind.__mro__.index(GenerationMixin)]:
        if "generate" in vars(base):
            codes = (getattr(unwrap(value), "__code__", None) for value in vars(base).values())
            named = [set(code.co_names) for code in codes if code is not None]
            if any(_HOOK in names for names in named):
                return True
            if not any("generate" in names and names & bases for names in named):
                return False
    return True


@once
def _install() -> None:
    """Puts our hooks in front of generate()'s; never undone."""
    mixin: Any = GenerationMixin
    setattr(mixin, _HOOK, _in_front_of(getattr(mixin, _HOOK)))
    mixin.init_continuous_batching = _refusing(mixin.init_continuous_batching)


def _enabled_for(model: Any) -> Enabled | None:
    with _lock:
        active = _enabled.get(model)
        return active[-1] if active else None


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _enabled_for(model) is not None:
            raise ValueError(
                "cache_implementation 'paged' and model.generate_batch() are transformers' own "
                "continuous batching: it has no PagedCache, and on a CPU takes nearly all memory. "
                "paged_kv.hf.generate_batch(model, prompts, policy, budget) is ours"
            )
        return original(model, *args, **kwargs)

    return init


def _in_front_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def prepare(model: Any, config: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        enabled = _enabled_for(model)
        if enabled is None or not enabled.is_meant(config, inputs):
            return original(model, config, inputs, *args, **kwargs)
        inputs[compat.cache_argument()] = cache = enabled.make_and_watch()
        if config.is_assistant:
            cache.activate_past_recording()
        return None

    return prepare
