"""Options that a user can set: a default, a reader that refuses what is wrong, a line of help.

An option is written once. What is said of it elsewhere (on command lines, by `paged-kv options`, in
the tables of the documents) comes from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, NamedTuple

from paged_kv.core.schedule import MAX_TOKENS

MOST = MAX_TOKENS - 1  # of an option that is a number of anything: what int32 holds, too
MOST_OBSERVED = 1 << 16  # queries that are kept for each sequence and layer
_SHOWN = 100  # characters of a wrong value
_KEY = "option"  # of a field's metadata


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


def parse_json(text: str, name: str = "kv-policy-config") -> dict[str, Any]:
    """The object in the option of that name. Raises ValueError."""
    try:
        values = read_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error} in {shown(text)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object, not {shown(text)}")
    return values


class Option(NamedTuple):
    """One option.

    Args:
        default: the value if the user gives none.
        read: (name, value) -> value; raises ValueError naming the option and what is allowed.
        help: a line about it, without a point at its end.
        metavar: what stands for its value on a command line.
        variable: the environment variable that it comes from if it is not given.
        old_name: what it was called before.
    """

    default: Any
    read: Callable[[str, Any], Any]
    help: str = ""
    metavar: str = ""
    variable: str = ""
    old_name: str = ""

    @property
    def shown_default(self) -> str:
        """The default as a user would write it; `none` for an empty string."""
        if isinstance(self.default, str):
            return self.default or "none"
        return json.dumps(self.default)

    def describe(self) -> str:
        """The line of help with the default."""
        return f"{self.help} (default {self.shown_default})".lstrip()


def option(
    kind: Option, help: str, metavar: str = "", variable: str = "", old_name: str = ""
) -> Any:
    """A field of a dataclass that is an option; see Option and declared_options."""
    declared = kind._replace(help=help, metavar=metavar, variable=variable, old_name=old_name)
    return field(default=kind.default, metadata={_KEY: declared})


def declared_options(kind: type) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name."""
    return {each.name: each.metadata[_KEY] for each in fields(kind) if _KEY in each.metadata}


def integer(default: int, least: int = 0, most: float = MOST, help: str = "") -> Option:
    """An integer in [least, most]."""

    def read(name: str, value: Any) -> int:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not least <= value <= most:
            up_to = f" and <= {most}" if is_integer and value > most else ""
            raise ValueError(f"{name} must be an integer >= {least}{up_to}, not {shown(value)}")
        return int(value)

    return Option(default, read, help)


def number(default: float, least: float, most: float, help: str = "") -> Option:
    """A number in [least, most]."""

    def read(name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least} to {most}, not {shown(value)}")
        return float(value)

    return Option(default, read, help)


def boolean(default: bool, help: str = "") -> Option:
    """true or false."""

    def read(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value

    return Option(default, read, help)


def choice(*names: str, help: str = "") -> Option:
    """One of these names; the first is the default."""

    def read(name: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, not {shown(value)}")
        return str(value)

    return Option(names[0], read, help)


def text(default: str, help: str = "") -> Option:
    """Any string; the policy says what it means."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {shown(value)}")
        return value

    return Option(default, read, help)
