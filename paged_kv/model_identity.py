"""Which model a directory holds, told without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "*.safetensors", "*.bin", "*.pt", "*.pth"
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file of weights
# What shapes attention. How the rest is written differs between versions of transformers.
_CONFIG = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class ModelShape(NamedTuple):
    """Sizes of a model; None: not known.

    Args:
        layers: of all kinds.
        kv_heads: of each layer, on all ranks together.
        group: query heads that share a KV head.
        head_dim: of queries and keys.
    """

    layers: int | None = None
    kv_heads: int | None = None
    group: int | None = None
    head_dim: int | None = None


def shape_of(config: Any) -> ModelShape:
    """What a decoder's config of transformers says."""
    heads, size = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    if not head_dim and heads and size:
        head_dim = size // heads
    group = heads // kv_heads if heads and kv_heads else None
    return ModelShape(getattr(config, "num_hidden_layers", None), kv_heads, group, head_dim)


def identity(directory: Path) -> str | None:
    """Hexadecimal digits that tell models apart; None for a directory without config and weights.

    Of the config, and of the weights' files their sizes and some of the bytes: in reading all of a
    large model a server would lose a minute.
    """
    files = sorted(file for pattern in WEIGHTS for file in directory.glob(pattern))
    try:
        config = json.loads((directory / "config.json").read_text())
        digest = hashlib.sha256()
        config = config.get("text_config", config)
        kept = {key: config.get(key) for key in _CONFIG} | {"rope": _rope(config)}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        for file in files:
            _sample(file, digest)
    except (OSError, ValueError, AttributeError):
        return None
    return digest.hexdigest()[:16] if files else None


def _rope(config: dict[str, Any]) -> tuple[Any, Any]:
    """(base, kind) of RoPE, wherever a version of transformers writes them."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = config.get("rope_theta", settings.get("rope_theta"))
    kind = settings.get("rope_type", settings.get("type"))
    return (None if base is None else float(base), kind or "default")


def _sample(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek(size * sample // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
