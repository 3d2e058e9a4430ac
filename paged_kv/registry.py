"""Policy names, loaded when asked for; other packages add theirs by an entry point.

A name is ``full``, ``NAME`` or ``pyramidal+NAME``; ``pyramidal`` alone means the default NAME.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paged_kv.policies.base import Policy

FULL = "full"
PYRAMIDAL = "pyramidal"
DEFAULT_SELECTOR = "streaming"
ENTRY_POINT_GROUP = "paged_kv.policies"

_BUILT_IN = {
    "streaming": "paged_kv.policies.streaming:Streaming",
}


def _locations() -> dict[str, str]:
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return found | _BUILT_IN


def split(policy: str) -> tuple[str | None, str]:
    """(budget shape or None, name of the policy that picks the survivors)."""
    if policy == PYRAMIDAL:
        return PYRAMIDAL, DEFAULT_SELECTOR
    shape, plus, name = policy.rpartition("+")
    return (shape if plus else None), name


def check(policy: object) -> None:
    """Raises ValueError, listing the names that exist, unless policy is one of them."""
    names = _locations()
    shape, name = split(policy) if isinstance(policy, str) else (None, "")
    if policy != FULL and (name not in names or shape not in (None, PYRAMIDAL)):
        listed = ", ".join([FULL, PYRAMIDAL, *sorted(names)])
        raise ValueError(
            f"unknown kv-policy {policy!r}; known are: {listed}, and {PYRAMIDAL}+NAME for each NAME"
        )


def load(name: str) -> type[Policy]:
    """The class of the policy that picks survivors under this name."""
    module, _, attribute = _locations()[name].partition(":")
    policy: type[Policy] = getattr(importlib.import_module(module), attribute)
    return policy


def available() -> dict[str, str]:
    """Every name with one line about it."""
    lines = {
        FULL: "keeps everything: vLLM as it is",
        PYRAMIDAL: f"larger budgets for the first layers; picks survivors by {DEFAULT_SELECTOR}",
    }
    for name in sorted(_locations()):
        lines[name] = (load(name).__doc__ or "").strip().splitlines()[0].rstrip(".")
    return lines
