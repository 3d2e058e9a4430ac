"""Sizes in bytes, as users write and read them."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}


def read_size(name: str, text: str) -> int:
    """40GiB, 80GB, 1.5 TiB or plain bytes. Raises ValueError, naming the option."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    factor = match and _LOWER.get(match[2].lower())
    num_bytes = int(float(match[1]) * factor) if match and factor else 0
    if num_bytes < 1:
        raise ValueError(f"{name} must be a size such as 40GiB, 80GB or 1073741824, not {text!r}")
    return num_bytes


def show_size(num_bytes: float) -> str:
    """With three digits: 23.4 MiB."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
