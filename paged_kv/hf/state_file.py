"""The file of a saved cache: tensors by name in safetensors, and a JSON text about them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Tensor = torch.Tensor
_KEY = "paged_kv"  # of the metadata: the text
_CHECKSUM = "checksum"
VERSION = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Any) -> None:
    """Writes a file of that name, or replaces it; whoever reads sees all of it, or the old one.

    Args:
        path: its directory exists.
        tensors: by name.
        about: what JSON can carry.

    Raises:
        ValueError: there is no such directory.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"path must be a file in an existing directory, not {str(path)!r}")
    content = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **about})
    metadata = {_KEY: text, _CHECKSUM: str(_checksum(content, text))}
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        try:
            save_file(content, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and what is said about them. The tensors may not be written to.

    Raises:
        ValueError: the file is missing, damaged, or none that write wrote.
    """
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    if _KEY not in metadata:
        raise ValueError(f"{path} is no file that PagedCache.save wrote")
    if str(_checksum(tensors, metadata[_KEY])) != metadata.get(_CHECKSUM):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    about = json.loads(metadata[_KEY])
    if about["version"] != VERSION:
        raise ValueError(
            f"{path} was saved by another version of paged_kv: format {about['version']}, "
            f"this one reads {VERSION}"
        )
    return tensors, about


def _alone(tensor: Tensor) -> Tensor:
    """The same in memory of its own: safetensors refuses what shares memory."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone()


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    """Of names, shapes, dtypes and bytes, and of the text."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
