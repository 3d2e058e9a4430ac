"""What options may be whose values are no plain numbers: readers, (name, value) -> value."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from paged_kv.core import options as opt
from paged_kv.core.page_formats import FORMATS
from paged_kv.core.schedule import MAX_DENOMINATOR


def read_budget(name: str, value: Any) -> int | Fraction:
    """An int >= 1, or a number with a point in (0, 1) as the fraction that it means.

    That is the nearest with a denominator up to MAX_DENOMINATOR, however the number comes: 1 - 0.7
    is 3/10, and 0.3333333333333333 a third. Times MAX_TOKENS tokens it fits into int64.

    Raises:
        ValueError: anything else.
    """
    try:
        number = _number(value)
    except (ValueError, OverflowError, RecursionError):  # none, infinite, nested lists
        number = 0
    if 1 <= number <= opt.MOST if isinstance(number, int) else 0 < number < 1:
        return number
    raise ValueError(
        f"{name} must be an integer >= 1 (at most {opt.MOST}) or a number with a point between 0 "
        f"and 1 (at least {1 / MAX_DENOMINATOR:g}), not {opt.shown(value)}"
    )


def _number(value: Any) -> int | Fraction:
    if isinstance(value, Fraction):
        value = float(value)
    text = str(value).strip()
    if text.lstrip("+-").isdigit():
        return int(text)
    return Fraction(float(text)).limit_denominator(MAX_DENOMINATOR)


def read_beta(name: str, value: Any) -> float:
    """A number >= 1. Raises ValueError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 1e6:
        raise ValueError(f"{name} must be a number >= 1, not {opt.shown(value)}")
    return float(value)


def read_layers(name: str, value: Any) -> tuple[int, ...]:
    """Indices of layers, sorted, each once. Raises ValueError."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of layer indices, not {opt.shown(value)}")
    return tuple(sorted({opt.integer(0).read(name, index) for index in value}))


def read_page_format(name: str, value: Any) -> str:
    """A format's name, or a file that has one for each layer. Raises ValueError."""
    if value not in FORMATS and not (isinstance(value, str) and value.endswith(".json")):
        raise ValueError(
            f"{name} must be one of {', '.join(FORMATS)} or a .json file, not {opt.shown(value)}"
        )
    return str(value)
