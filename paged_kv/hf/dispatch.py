"""Puts our attention and mask functions in front of those that models look up.

What decides is what a call is given, never the model or its config: keys that are Handles, a
length that a PagedLayer gave, an engine. Everything else goes to the function that transformers
would have called, with the same arguments. So nothing of a model changes, whatever its attention
implementation is, and nothing has to be undone.

Models with "eager" bring a function of their own, which is in no registry: therefore lookups are
changed, and not what is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from paged_kv.hf.attention_function import paged_attention
from paged_kv.hf.handle import Handle
from paged_kv.hf.masks import MaskSpec, PagedLength, note
from paged_kv.hf.once import once
from paged_kv.hf.seams import ENGINE, engine_attention


@once
def install() -> None:
    """Makes models call our functions where a call is ours; never undone."""
    interface: Any = AttentionInterface
    interface.__getitem__ = _lookup(interface.__getitem__, attention)
    interface.get_interface = _lookup(interface.get_interface, attention)
    interface = AttentionMaskInterface
    interface.__getitem__ = _lookup(interface.__getitem__, mask)


def _lookup(find: Callable[..., Any], front: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(find)
    def look_up(*args: Any, **kwargs: Any) -> Any:
        function = find(*args, **kwargs)
        if isinstance(function, partial) and function.func is front:
            return function
        return partial(front, function)

    return look_up


def attention(original: Any, module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
    """Ours for keys in pages and for an engine's forward pass; else the original function."""
    if isinstance(key, Handle):
        return paged_attention(module, query, key, *args, **kwargs)
    if ENGINE in kwargs:
        return engine_attention(module, query, key, *args, **kwargs)
    if any(isinstance(value, MaskSpec) for value in (*args, *kwargs.values())):  # of paged layers
        args = tuple(map(_dense, args))
        kwargs = {name: _dense(value) for name, value in kwargs.items()}
    return original(module, query, key, *args, **kwargs)


def _dense(argument: Any) -> Any:
    return argument.dense() if isinstance(argument, MaskSpec) else argument


def mask(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A MaskSpec for layers of a PagedCache; else what the original function makes."""
    if isinstance(kwargs.get("kv_length"), PagedLength):
        return note(original, kwargs)
    return original(*args, **kwargs)
