"""Files of query statistics for tests: random numbers of a size that attention can make sense of.

Written with safetensors alone, and not by the package. A file's name says what is in it: all
processes of a test run name the same one, whoever wrote it.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FORMAT = "paged_kv query statistics 1"
Shape = tuple[int, int, int, int]  # layers, KV heads, query heads of each, head_dim


def statistics(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """What a file holds: logarithms of attention that keys of about unit variance expect, -1 to -8.

    Args:
        shape: of the model.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    size = shape[-1]
    numbers = {
        "linear": rng.normal(0, 1.5 / size**0.5, shape),
        "quadratic": rng.uniform(0, 1 / size, shape),
        "normaliser": rng.normal(5, 1, shape[:-1]),
    }
    return {name: part.astype(np.float16) for name, part in numbers.items()}


def write(path: Path, shape: Shape, seed: int = 0, **changed: np.ndarray) -> Path:
    """Writes such a file; changed: other numbers by name."""
    save_file(statistics(shape, seed) | changed, path, {"format": FORMAT})
    return path


@cache
def shared(*shape: int) -> str:
    """The path of a file for a model of this shape; it stays."""
    folder = Path(tempfile.gettempdir()) / f"paged_kv_tests_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"queries_{'x'.join(map(str, shape))}.safetensors"
    layers, kv_heads, group, head_dim = shape
    own = write(folder / f"{path.stem}_{os.getpid()}", (layers, kv_heads, group, head_dim))
    own.replace(path)  # others may be reading it
    return str(path)


@cache
def read(path: str) -> dict[str, np.ndarray]:
    """A file's numbers, as float64."""
    return {name: part.astype(np.float64) for name, part in load_file(path).items()}
