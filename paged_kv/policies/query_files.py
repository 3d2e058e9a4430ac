"""Files of query statistics: what they hold, and where a model's is found."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paged_kv.kernels.operands import Expected
from paged_kv.model_identity import ModelShape, identity
from paged_kv.models import cache_root, directory_of
from paged_kv.policies.query_statistics import Int64s

Tensor = torch.Tensor
SHIPPED = Path(__file__).parent / "statistics"
SUFFIX = ".safetensors"
_FORMAT = "paged_kv query statistics 1"


class StoredStatistics:
    """Statistics of all layers and KV heads of a model; see KnowsQueries.

    Args:
        every: of the model.
        about: what was read: model, text, tokens.
    """

    def __init__(self, every: Expected, about: dict[str, str]) -> None:
        self.every, self.about = every, about
        self._chosen: dict[Any, Expected] = {}

    def of(self, layers: Int64s, heads: Int64s, device: torch.device) -> Expected:
        """See KnowsQueries; copied to a device once.

        Raises:
            ValueError: the file has no such layers or heads.
        """
        key = tuple(layers.tolist()), tuple(heads.tolist()), device
        if key not in self._chosen:
            shape = self.every.linear.shape
            if max(key[0]) >= shape[0] or max(key[1]) >= shape[1]:
                raise ValueError(
                    f"statistics of {shape[0]} layers and {shape[1]} KV heads are of another model"
                )
            parts = (part[key[0], :][:, key[1]] for part in self.every)
            self._chosen[key] = Expected(*(part.float().to(device) for part in parts))
        return self._chosen[key]


def save(path: Path, statistics: Expected, about: dict[str, str]) -> None:
    """Writes a file that load reads; numbers are rounded to float16.

    Args:
        path: of the file.
        statistics: of all layers and KV heads of a model.
        about: what was read.
    """
    tensors = {name: part.cpu().half() for name, part in statistics._asdict().items()}
    save_file(tensors, path, {"format": _FORMAT, **about})
    path.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read


def load(path: Path) -> StoredStatistics:
    """Raises ValueError: the file is missing, or holds something else."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"statistics: {path} is no readable .safetensors file: {error}") from None
    if about.get("format") != _FORMAT or set(found) != set(Expected._fields):
        raise ValueError(f"statistics: {path} was not written by paged-kv calibrate queries")
    statistics = Expected(**found)
    shape = statistics.linear.shape
    if len(shape) != 4 or [part.shape for part in statistics] != [shape, shape, shape[:-1]]:
        raise ValueError(f"statistics: {path} holds tensors that do not fit each other")
    if not all(bool(part.isfinite().all()) for part in statistics):
        raise ValueError(f"statistics: {path} holds numbers that are not finite")
    return StoredStatistics(statistics, about)


def check_shape(path: Path, shape: ModelShape) -> None:
    """Raises ValueError: the file, which load reads, is not of a model of this shape."""
    there = ModelShape(*load(path).every.linear.shape)
    if any(known not in (None, own) for known, own in zip(shape, there, strict=True)):
        raise ValueError(
            f"statistics: {path} is of another model: of {_described(there)}; this one has "
            f"{_described(shape)}"
        )


def _described(shape: ModelShape) -> str:
    layers, kv_heads, group, head_dim = ("?" if each is None else each for each in shape)
    heads = f"{kv_heads} KV heads with {group} query heads each"
    return f"{layers} layers, {heads}, head_dim {head_dim}"


def place_of(directory: Path) -> Path | None:
    """Where the file of a model is kept in the user's cache; None: it is no model's directory."""
    name = identity(directory)
    return None if name is None else cache_root() / "query_statistics" / f"{name}{SUFFIX}"


def find(model: str) -> Path | None:
    """The file of a model, shipped or in the user's cache; None if there is none.

    Args:
        model: a directory, or a name of the hub.
    """
    place = _place_of(model, str(cache_root())) if model else None
    if place is None:
        return None
    return next((path for path in (place, SHIPPED / place.name) if path.is_file()), None)


@cache  # every cache of transformers' asks
def _place_of(model: str, _: str) -> Path | None:
    directory = directory_of(model)
    return None if directory is None else place_of(directory)
