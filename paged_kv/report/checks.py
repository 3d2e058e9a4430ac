"""Whether the fields of result rows are of the kinds that the page counts on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paged_kv.results import Row


def check(rows: Sequence[Row]) -> None:
    """Raises ValueError, naming the row, for fields that are not of the kind they must be."""
    if not rows:
        raise ValueError("results: no rows in the files given")
    for index, row in enumerate(rows, 1):
        for name, (kind, holds) in KINDS.items():
            if name in row and not holds(row[name]):
                where = f"result row {index} ({row['task']}, {row['policy']})"
                raise ValueError(f"{where}: {name} must be {kind}, not {row[name]!r}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list_of(*names: str) -> Callable[[Any], bool]:
    """Whether it is a list of objects that have numbers of these names; null, too."""

    def holds(value: Any) -> bool:
        return value is None or (
            isinstance(value, list)
            and all(isinstance(each, dict) for each in value)
            and all(_is_number(each.get(name)) for each in value for name in names)
        )

    return holds


_OPTIONAL = ("a number or null", lambda value: value is None or _is_number(value))
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("task", "policy", "metric"), ("a name", _is_name)),
    **dict.fromkeys(
        ("score", "standard_error", "budget", "kept", "bytes_per_token", "seconds"), _OPTIONAL
    ),
    "higher_is_better": ("true or false", lambda value: isinstance(value, bool)),
    "versions": ("an object", lambda value: isinstance(value, dict)),
    "kept_by_layer": (
        "a list of numbers",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_number, value))),
    ),
    "by_position": (
        "a list of position and agreement",
        _is_list_of("position", "agreement"),
    ),
    "cells": (
        "a list of length, depth, found and asked",
        _is_list_of("length", "depth", "found", "asked"),
    ),
}
