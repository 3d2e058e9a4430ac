"""Which build of the C++ kernels this process uses."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before the libraries: they share its threads (libgomp)

FOLDER = Path(__file__).parent
BUILDS = ("avx512", "avx2", "portable")  # the best first
REFERENCE = "reference"
VARIABLE = "PAGED_KV_CPU_KERNELS"
CPU_BITS = {"avx512": 2, "avx2": 1, "portable": 0}
OTHER_CPU = "this CPU lacks instructions it uses"
NOT_BUILT = "not built"
FUNCTIONS = (
    *("write", "gather", "store", "move", "attend", "attention_mass"),
    *("lowest", "pair_moves", "first_places", "expected_attention"),
)


@lru_cache(maxsize=1)
def best() -> ctypes.CDLL | None:
    """The kernels to use; None for torch's operations instead, with one warning.

    Raises:
        ValueError: PAGED_KV_CPU_KERNELS names no build, or one that is not here.
    """
    forced = os.environ.get(VARIABLE)
    if forced == REFERENCE:
        return None
    if forced:
        if forced not in BUILDS:
            allowed = ", ".join((*BUILDS, REFERENCE))
            raise ValueError(f"{VARIABLE} must be one of {allowed}, not {forced!r}")
        library, why = load(forced)
        if library is None:
            raise ValueError(f"{VARIABLE}={forced}: {why}")
        return library
    reasons = []
    for build in BUILDS:
        library, why = load(build)
        if library is not None:
            return library
        reasons.append(f"{build}: {why}")
    warnings.warn(
        "paged_kv has no compiled kernels for this CPU: torch reads packed pages, "
        f"many times slower ({'; '.join(reasons)}). They are built when paged_kv is installed "
        "and a C++ compiler is there.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def load(build: str) -> tuple[ctypes.CDLL | None, str]:
    """(a build, "") or (None, why not)."""
    if CPU_BITS[build] & ~cpu_bits():
        return None, OTHER_CPU
    file = _file(build)
    if file is None:
        return None, NOT_BUILT
    try:
        return _typed(ctypes.CDLL(str(file))), ""
    except OSError as error:
        return None, str(error)


def cpu_bits() -> int:
    """Which builds the CPU can run, as the portable one finds; 0 without that."""
    file = _file("portable")
    try:
        return ctypes.CDLL(str(file)).paged_kv_cpu() if file else 0
    except OSError:
        return 0


def _file(build: str) -> Path | None:
    files = sorted(FOLDER.glob(f"_{build}.*so"))
    return files[0] if files else None


def _typed(library: Any) -> Any:
    for name in FUNCTIONS:
        function = getattr(library, f"paged_kv_{name}")
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int
    return library
