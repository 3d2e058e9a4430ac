"""The options, each written once: name, default, what is allowed and a line of help.

From here come the flags of vLLM's command line and their help, the environment's variables, what
`paged-kv options` prints and the tables in docs/.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import FrameType
from typing import Any

from paged_kv import registry
from paged_kv.core.options import (
    MOST_OBSERVED,
    Option,
    boolean,
    choice,
    declared_options,
    integer,
    number,
    option,
    text,
)
from paged_kv.core.readers import read_beta, read_budget, read_layers, read_page_format

DEFAULT_BUDGET = 1024
MAX_GIB = 1 << 20


def read_policy(_name: str, value: Any) -> str:
    """A policy's name; see registry. Raises ValueError: lists the names that exist."""
    registry.check(value)
    return str(value)


@dataclass(frozen=True)
class OptionTable:
    """The options that every policy has.

    A budget that is an int is a number of entries, one that is a Fraction a share of the tokens
    that were processed.
    """

    policy: str = option(
        Option(registry.FULL, read_policy),
        "what picks the survivors: NAME, or pyramidal+NAME; full keeps everything",
        metavar="NAME[+NAME]",
        variable="PAGED_KV_POLICY",
    )
    budget: int | Fraction = option(  # noqa: RUF009  a field
        Option(DEFAULT_BUDGET, read_budget),
        "entries kept per sequence and layer (mean), or with a point the fraction",
        metavar="N|F",
        variable="PAGED_KV_BUDGET",
    )
    num_sink_tokens: int = option(integer(4), "first entries of a sequence, never dropped")
    recent_window: int = option(integer(32), "newest entries, never dropped by any policy")
    pyramid_beta: float = option(
        Option(2.0, read_beta), "budget of the first layer over that of a layer past the last one"
    )
    pyramid_steps: int = option(
        integer(3, least=1),
        "distinct budgets that the pyramid is rounded to, in whole pages",
        old_name="tiers",
    )
    min_budget: int = option(
        integer(128, least=1), "least entries kept when the budget is a fraction"
    )
    compress_prefill: bool = option(boolean(False), "evict between the chunks of a prompt, too")
    start: str = option(
        choice("always", "pressure"),
        "always: drop from a prompt's end on; pressure: not before pages run out",
        metavar="WHEN",
    )
    skip_layers: tuple[int, ...] = option(Option((), read_layers), "layers that keep everything")
    max_groups: int = option(
        integer(8, least=1), "vLLM: KV cache groups allowed, each of which costs scheduling time"
    )
    page_format: str = option(
        Option("native", read_page_format),
        "how pages store numbers: native, int8, int4, fp8, or a .json file",
        metavar="FORMAT",
    )
    residual_pages: int = option(
        integer(0), "newest pages of a sequence that stay in the model's dtype", metavar="N"
    )
    swap_space: float = option(
        number(0.0, 0.0, MAX_GIB),
        "GiB of host memory for preempted requests, of all ranks; 0: no swap",
        metavar="GIB",
    )
    swap_dir: str = option(
        text(""), "an existing directory for what the memory cannot hold", metavar="DIR"
    )
    swap_dir_space: float = option(
        number(0.0, 0.0, MAX_GIB), "GiB of files there, of all ranks together", metavar="GIB"
    )
    swap_format: str = option(
        choice("native", "int8", "int4"),
        "how swapped pages store numbers: native, int8, int4",
        metavar="FORMAT",
    )
    spill: bool = option(boolean(False), "whether dropped entries go down a tier and can come back")
    spill_budget: int = option(
        integer(8192, least=1), "entries on the tier, per sequence and layer"
    )
    fetch_limit: int = option(
        integer(64, least=1), "entries that a compaction may fetch, per layer and KV head"
    )
    spill_window: int = option(
        integer(32, 1, MOST_OBSERVED), "last queries that say what is worth fetching"
    )
    spill_threshold: float = option(
        number(1.0, 0.0, 1e6), "times the attention of a survivor that a candidate must get"
    )
    spill_interval: int = option(
        integer(128), "tokens between looks of a sequence that decodes; 0: once per page"
    )
    spill_dir: str = option(text(""), "an existing directory for files; none: all in host memory")
    spill_host_budget: int = option(
        integer(4096, least=1), "of those, entries in host memory, if there is a spill_dir"
    )


OPTIONS = declared_options(OptionTable)
OLD_NAMES = {each.old_name: name for name, each in OPTIONS.items() if each.old_name}
VARIABLES = {name: each.variable for name, each in OPTIONS.items() if each.variable}


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that they have now. Raises ValueError: one is given by both names."""
    for old, name in OLD_NAMES.items():
        if old in values and name in values:
            raise ValueError(f"{old} is the old name of {name}: give {name} only, not both")
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}


def warn_of_old_names(values: Mapping[str, Any]) -> None:
    """A DeprecationWarning, where the package was called, for each old name among the options."""
    for old, name in OLD_NAMES.items():
        if old in values:
            message = f"the paged_kv option {old} is now called {name}"
            warnings.warn(message, DeprecationWarning, stacklevel=_frames_inside() + 1)


def _frames_inside() -> int:
    """How many callers, from the one of this function on, are in this package."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("paged_kv."):
        frame, count = frame.f_back, count + 1
    return count
