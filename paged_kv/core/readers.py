"""What CompressionConfig's options may be: for each a reader, (name, value) -> value."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from paged_kv.core import options as opt
from paged_kv.core.page_formats import FORMATS
from paged_kv.core.schedule import MAX_DENOMINATOR

MAX_GIB = 1 << 20


def parse_budget(name: str, value: Any) -> int | Fraction:
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


def _beta(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 1e6:
        raise ValueError(f"{name} must be a number >= 1, not {opt.shown(value)}")
    return float(value)


def _layers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of layer indices, not {opt.shown(value)}")
    return tuple(sorted({opt.integer(0).read(name, index) for index in value}))


def _policy(name: str, value: Any) -> str:
    return str(value)


def _page_format(name: str, value: Any) -> str:
    if value not in FORMATS and not (isinstance(value, str) and value.endswith(".json")):
        raise ValueError(
            f"{name} must be one of {', '.join(FORMATS)} or a .json file, not {opt.shown(value)}"
        )
    return str(value)


READERS: dict[str, Any] = {
    "policy": _policy,
    "budget": parse_budget,
    "num_sink_tokens": opt.integer(0).read,
    "recent_window": opt.integer(0).read,
    "pyramid_beta": _beta,
    "min_budget": opt.integer(1, least=1).read,
    "compress_prefill": opt.boolean(False).read,
    "skip_layers": _layers,
    "tiers": opt.integer(1, least=1).read,
    "max_groups": opt.integer(1, least=1).read,
    "page_format": _page_format,
    "residual_pages": opt.integer(0).read,
    "swap_space": opt.number(0.0, 0.0, MAX_GIB).read,
    "swap_dir": opt.text("").read,
    "swap_dir_space": opt.number(0.0, 0.0, MAX_GIB).read,
    "swap_format": opt.choice("native", "int8", "int4").read,
    "spill": opt.boolean(False).read,
    "spill_budget": opt.integer(8192, least=1).read,
    "fetch_limit": opt.integer(64, least=1).read,
    "spill_window": opt.integer(32, 1, opt.MOST_OBSERVED).read,
    "spill_threshold": opt.number(1.0, 0.0, 1e6).read,
    "spill_interval": opt.integer(128).read,
    "spill_dir": opt.text("").read,
    "spill_host_budget": opt.integer(4096, least=1).read,
}
