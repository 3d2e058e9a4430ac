"""What CompressionConfig's options may be: for each a reader, (name, value) -> value."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from paged_kv.core import options as opt
from paged_kv.core.page_formats import FORMATS

MAX_GIB = 1 << 20


def parse_budget(name: str, value: Any) -> int | Fraction:
    """An int >= 1, or a number with a point in (0, 1) as an exact fraction. Raises ValueError."""
    allowed = f"{name} must be an integer >= 1 or a number with a point between 0 and 1"
    if isinstance(value, Fraction):
        value = float(value)
    text = str(value).strip()
    try:
        budget: int | Fraction = int(text) if text.lstrip("+-").isdigit() else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{allowed}, not {value!r}") from None
    in_range = budget >= 1 if isinstance(budget, int) else 0 < budget < 1
    if not in_range or isinstance(value, bool) or "/" in text:
        raise ValueError(f"{allowed}, not {value!r}")
    return budget


def _beta(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 1e6:
        raise ValueError(f"{name} must be a number >= 1, not {value!r}")
    return float(value)


def _layers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of layer indices, not {value!r}")
    return tuple(sorted({opt.integer(0).read(name, index) for index in value}))


def _policy(name: str, value: Any) -> str:
    return str(value)


def _page_format(name: str, value: Any) -> str:
    if value not in FORMATS and not (isinstance(value, str) and value.endswith(".json")):
        raise ValueError(
            f"{name} must be one of {', '.join(FORMATS)} or a .json file, not {value!r}"
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
    "spill_window": opt.integer(32, least=1).read,
    "spill_threshold": opt.number(1.0, 0.0, 1e6).read,
    "spill_interval": opt.integer(128).read,
    "spill_dir": opt.text("").read,
    "spill_host_budget": opt.integer(4096, least=1).read,
}
