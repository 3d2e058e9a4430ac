"""Options that a user can set: a default, and a reader that refuses what is not allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option.

    Args:
        default: the value if the user gives none.
        read: (name, value) -> value; raises ValueError naming the option and what is allowed.
    """

    default: Any
    read: Callable[[str, Any], Any]


def integer(default: int, least: int = 0) -> Option:
    """An integer >= least."""

    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, not {value!r}")
        return value

    return Option(default, read)


def number(default: float, least: float, most: float) -> Option:
    """A number in [least, most]."""

    def read(name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least} to {most}, not {value!r}")
        return float(value)

    return Option(default, read)


def boolean(default: bool) -> Option:
    """true or false."""

    def read(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return value

    return Option(default, read)


def choice(*names: str) -> Option:
    """One of these names; the first is the default."""

    def read(name: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, not {value!r}")
        return str(value)

    return Option(names[0], read)


def text(default: str) -> Option:
    """Any string; the policy says what it means."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {value!r}")
        return value

    return Option(default, read)
