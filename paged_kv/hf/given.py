"""A cache that generate() was given is used, or generate() ends with an error.

Models may put a cache aside, or another one in its place: in prepare_inputs_for_generation, under
gradient checkpointing, in code of their own. generate() goes on without it and says nothing. So
after each forward pass, where generate() takes up what the model returns, ours are asked whether
they were used. That is in GenerationMixin, and is put there with the first PagedCache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import GenerationMixin

from paged_kv.hf import compat
from paged_kv.hf.once import once


@once
def watch() -> None:
    """From now on, generate() checks the caches of ours that it was given."""
    mixin: Any = GenerationMixin
    mixin._prefill = _after_prefill(mixin._prefill)
    mixin._update_model_kwargs_for_generation = _after_each(
        mixin._update_model_kwargs_for_generation
    )


def _after_prefill(prefill: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prefill)
    def watched(
        model: Any, input_ids: Any, config: Any, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        cache = inputs.get(compat.cache_argument())  # prefill in chunks replaces it
        _check_chunks(config, cache)
        _forget(cache)
        outputs = prefill(model, input_ids, config, inputs, *args, **more)
        _check(model, cache)
        return outputs

    return watched


def _after_each(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def watched(model: Any, outputs: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        _check(model, inputs.get(compat.cache_argument()))
        _forget(inputs.get(compat.cache_argument()))
        return update(model, outputs, inputs, *args, **more)

    return watched


def _own(cache: Any) -> Any:
    """The PagedCache in what generate() was given; None: there is none."""
    paged_cache = getattr(cache, "self_attention_cache", cache)
    return paged_cache if hasattr(paged_cache, "is_used") else None


def _forget(cache: Any) -> None:
    if (paged_cache := _own(cache)) is not None:
        paged_cache.is_used = False


def _check_chunks(config: Any, cache: Any) -> None:
    """Raises ValueError: this transformers would process again what a cache of ours holds."""
    paged_cache, size = _own(cache), config.prefill_chunk_size
    if paged_cache is None or size is None or not compat.chunks_begin_anew():
        return
    if held := paged_cache.get_seq_length():
        raise ValueError(
            f"prefill_chunk_size {size}: the cache holds {held} tokens, and before 5.24 "
            "transformers begins with the first of all tokens again when it splits them: leave "
            "prefill_chunk_size out, or call model(chunk, past_key_values=cache) for each chunk"
        )


def _check(model: Any, cache: Any) -> None:
    """Raises ValueError: the PagedCache in what generate() was given has not been used."""
    paged_cache = _own(cache)
    if paged_cache is not None and not paged_cache.is_used:
        if (step := paged_cache.sequences.step) is not None:  # the last layer was left out
            step.check_done(paged_cache.sequences.layers)
        raise ValueError(
            f"{type(model).__name__} was given a PagedCache and did not use it: the model put it "
            "aside or replaced it, so nothing would be compressed. Known causes: gradient "
            "checkpointing in training mode (call model.eval()), and a model whose "
            "prepare_inputs_for_generation drops its cache: such a model needs its own cache"
        )
