"""Options that a user can set: a default, and a reader that refuses what is not allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from paged_kv.core.schedule import MAX_TOKENS

MOST = MAX_TOKENS - 1  # of an option that is a number of anything: what int32 holds, too
MOST_OBSERVED = 1 << 16  # queries that are kept for each sequence and layer
_SHOWN = 100  # characters of a wrong value


def shown(value: Any) -> str:
    """A wrong value as an error message has it: its repr, or the beginning of that."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of 5,000 digits; lists 100,000 deep
        return f"this {type(value).__name__}, which is too large to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def read_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError: it is none, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Option(NamedTuple):
    """One option.

    Args:
        default: the value if the user gives none.
        read: (name, value) -> value; raises ValueError naming the option and what is allowed.
    """

    default: Any
    read: Callable[[str, Any], Any]


def integer(default: int, least: int = 0, most: float = MOST) -> Option:
    """An integer in [least, most]."""

    def read(name: str, value: Any) -> int:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not least <= value <= most:
            up_to = f" and <= {most}" if is_integer and value > most else ""
            raise ValueError(f"{name} must be an integer >= {least}{up_to}, not {shown(value)}")
        return int(value)

    return Option(default, read)


def number(default: float, least: float, most: float) -> Option:
    """A number in [least, most]."""

    def read(name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least} to {most}, not {shown(value)}")
        return float(value)

    return Option(default, read)


def boolean(default: bool) -> Option:
    """true or false."""

    def read(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value

    return Option(default, read)


def choice(*names: str) -> Option:
    """One of these names; the first is the default."""

    def read(name: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, not {shown(value)}")
        return str(value)

    return Option(names[0], read)


def text(default: str) -> Option:
    """Any string; the policy says what it means."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {shown(value)}")
        return value

    return Option(default, read)
