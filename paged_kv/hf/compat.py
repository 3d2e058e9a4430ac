"""The transformers versions we were tested with, and what is called otherwise in some of them.

What we rely on there is tested in tests/test_transformers_seams.py,
test_transformers_batch_seams.py and test_reference_models.py.
"""

from __future__ import annotations

import inspect
import logging
from importlib import metadata
from typing import Any

from paged_kv import versions

logger = logging.getLogger(__name__)

TESTED = ("5.19", "5.20", "5.21", "5.22", "5.23", "5.24")


def check_version() -> None:
    """Raises ValueError for any other, unless the user allows it: our seams are internal there."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return  # whoever needs it says so
    versions.check("transformers", version, TESTED, logger)


def cache_argument() -> str:
    """What models and generate() call their cache: from transformers 5.24 on "cache"."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = BaseModelOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"


def chunks_begin_anew() -> bool:
    """Whether generate() splits all of its tokens into chunks, whatever its cache holds.

    Until 5.23; since 5.24, which has the other name for caches, only those that are new.
    """
    return cache_argument() == "past_key_values"


def resolve_batching(config: Any, settings: Any, has_processors: bool, device: Any) -> Any:
    """transformers' settings for continuous batching; from 5.21 on it wants to know the device."""
    from transformers.generation.continuous_batching.initialization import (
        resolve_continuous_batching_config as resolve,
    )

    more = {"device": device} if "device" in inspect.signature(resolve).parameters else {}
    return resolve(config, settings, None, has_processors, **more)
