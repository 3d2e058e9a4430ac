"""Numbers and names as the view writes them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

UNKNOWN = "-"
BARS = "▁▂▃▄▅▆▇█"


def plain(text: str) -> str:
    """Without what could steer a terminal: control and format characters, line separators."""
    kept = (c for c in text if unicodedata.category(c)[0] != "C")
    return "".join(" " if unicodedata.category(c) in ("Zl", "Zp") else c for c in kept)


def count(number: float | None) -> str:
    """A whole number with commas."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def rate(number: float | None) -> str:
    """Per second; one digit after the point while the number is small."""
    if number is None:
        return UNKNOWN
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def percent(part: float | None, whole: float | None) -> str:
    """Of the whole, which may be nothing."""
    if part is None or not whole:
        return UNKNOWN
    return f"{100 * part / whole:.1f}%"


def spark(numbers: Sequence[float], width: int) -> str:
    """The last numbers as bars, a character each; the largest of them has the highest bar."""
    shown = numbers[max(len(numbers) - width, 0) :]
    largest = max(shown, default=0.0)
    if largest <= 0:
        return BARS[0] * len(shown)
    return "".join(BARS[round(max(n, 0.0) / largest * (len(BARS) - 1))] for n in shown)


def flow(items: Iterable[str], width: int) -> list[str]:
    """Lines of items, none of which is broken."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += f"   {item}"
        else:
            lines.append(item)
    return lines
