"""Refuses versions of vLLM and transformers that nobody tested: what we use of them moves."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

VARIABLE = "PAGED_KV_ALLOW_UNTESTED"

_warned: set[tuple[str, str]] = set()


def check(
    library: str, version: str, tested: Sequence[str], logger: logging.Logger, hint: str = ""
) -> None:
    """Lets a tested version pass, and any other at the user's own risk, with one warning.

    Args:
        library: its name.
        version: the installed one.
        tested: release series, as "5.19", in order.
        logger: gets the warning.
        hint: what else can be done about it.

    Raises:
        ValueError: the version is not of these series, and PAGED_KV_ALLOW_UNTESTED is not 1.
    """
    series = ".".join(version.split(".")[:2])
    if series in tested:
        return
    text = f"paged_kv was tested with {library} {', '.join(tested)}; this is {version}"
    if os.environ.get(VARIABLE) != "1":
        raise ValueError(f"{text}. To go on at your own risk, set {VARIABLE}=1{hint}")
    if (library, version) not in _warned:
        _warned.add((library, version))
        logger.warning("%s (%s=1): it may fail, or compute something else", text, VARIABLE)
