"""transformers: the only folder, besides models.py, that imports it.

What users need is here, loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from paged_kv.hf import compat

compat.check_version()  # before anything of transformers is imported that may have moved

_HOME = {
    "CacheStats": "stats",
    "PagedCache": "cache",
    "PagedEncoderDecoderCache": "encoder_decoder",
    "PagePool": "pool",
    "PoolFull": "pool",
    "enable": "enabling",
    "generate_batch": "batch.generate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
