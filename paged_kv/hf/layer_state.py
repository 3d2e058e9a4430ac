"""What transformers' own layers (sliding windows, linear attention) hold, as tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from paged_kv.hf.marks import INSTEAD

Tensor = torch.Tensor
_KIND = "class"


def crop_layers(layers: Sequence[Any], count: int) -> None:
    """Layers lose their last tokens.

    Raises:
        ValueError: they do not remember what was before; nothing has changed.
    """
    # What is most likely to refuse comes first; the others refuse all together.
    order = sorted(layers, key=lambda layer: not isinstance(layer, LinearAttentionCacheLayerMixin))
    try:
        for layer in order:
            layer.crop(-count)
    except RuntimeError:
        name = type(layer).__name__
        raise ValueError(f"crop(-{count}): a {name} cannot go back there: {INSTEAD}") from None


def encode(layer: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A layer's attributes in values that JSON can carry; adds its tensors to those of the file.

    Args:
        layer: of transformers.
        name: what the names of its tensors begin with.
        tensors: by name.

    Raises:
        ValueError: it holds something else than tensors, numbers, texts, dicts and lists of them.
    """
    kind = type(layer).__name__

    def encoded(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, list):
            return [encoded(item, f"{path}.{at}") for at, item in enumerate(value)]
        if isinstance(value, dict):
            return {"dict": [[key, encoded(item, f"{path}.{key}")] for key, item in value.items()]}
        raise ValueError(f"a layer of class {kind} cannot be saved: it has {path} {value!r}")

    state = {key: encoded(value, f"{name}.{key}") for key, value in vars(layer).items()}
    return {_KIND: kind, **state}


def decode(
    layer: Any, state: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """A new layer holds what one of its class has held.

    Raises:
        ValueError: it is of another class.
    """
    kind = type(layer).__name__
    if state[_KIND] != kind:
        raise ValueError(f"the saved cache has a layer of class {state[_KIND]}, here it is {kind}")

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]].clone().to(device)
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "device" in value:
            return device
        return {key: decoded(item) for key, item in value["dict"]}

    for key, value in state.items():
        if key != _KIND:
            setattr(layer, key, decoded(value))
