"""Policy names, loaded when asked for; other packages add theirs by an entry point.

A name is ``full``, ``NAME`` or ``pyramidal+NAME``; ``pyramidal`` alone means the default NAME.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_kv.core.options import Option
    from paged_kv.policies.base import EngineFacts, Policy

FULL = "full"
PYRAMIDAL = "pyramidal"
DEFAULT_SELECTOR = "calibrated_attention"
ENTRY_POINT_GROUP = "paged_kv.policies"
WRAPPED = "of"  # the option that makes a policy a wrapper

_BUILT_IN = {
    name: f"paged_kv.policies.{name}:{attribute}"
    for name, attribute in {
        "attention": "Attention",
        "calibrated_attention": "CalibratedAttention",
        "cluster": "Cluster",
        "expected_attention": "ExpectedAttention",
        "h2o": "H2O",
        "hybrid": "Hybrid",
        "keydiff": "KeyDiff",
        "knorm": "KNorm",
        "learned": "Learned",
        "lru": "LRU",
        "past_future": "PastFuture",
        "pooling": "Pooling",
        "random": "Random",
        "residual": "Residual",
        "snapkv": "SnapKV",
        "streaming": "Streaming",
        "tova": "TOVA",
        "value_merge": "ValueMerge",
        "window": "Window",
    }.items()
}


def _locations() -> dict[str, str]:
    plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return plugins | _BUILT_IN


def split(policy: str) -> tuple[str | None, str]:
    """(budget shape or None, name of the policy that picks the survivors)."""
    if policy == PYRAMIDAL:
        return PYRAMIDAL, DEFAULT_SELECTOR
    shape, plus, name = policy.rpartition("+")
    return (shape if plus else None), name


def check(policy: object) -> None:
    """Raises ValueError, listing the names that exist, unless policy is one of them."""
    shape, name = split(policy) if isinstance(policy, str) else (None, "")
    if policy == FULL or (name in _BUILT_IN and shape in (None, PYRAMIDAL)):
        return
    names = _locations()
    if name not in names or shape not in (None, PYRAMIDAL):
        listed = ", ".join([FULL, PYRAMIDAL, *sorted(names)])
        raise ValueError(
            f"unknown kv-policy {policy!r}; known are: {listed}, and {PYRAMIDAL}+NAME for each NAME"
        )


def load(name: str) -> type[Policy]:
    """The class of the policy that picks survivors under this name."""
    # What is installed is looked through (6 ms) for the names of others only; ours come first.
    module, _, attribute = (_BUILT_IN.get(name) or _locations()[name]).partition(":")
    policy: type[Policy] = getattr(importlib.import_module(module), attribute)
    return policy


def declared(name: str, values: Mapping[str, Any]) -> dict[str, Option]:
    """The options of a policy; of a wrapper, also those of the policy that it wraps.

    Raises:
        ValueError: values["of"] names no policy that can be wrapped.
    """
    options = dict(load(name).options)
    if not load(name).wraps:
        return options
    inner, names = values.get(WRAPPED, options[WRAPPED].default), _locations()
    is_name = isinstance(inner, str) and inner in names
    if not is_name or not load(inner).evicts:
        evicting = [other for other in names if load(other).evicts]
        allowed = ", ".join(sorted(evicting))
        raise ValueError(f"{WRAPPED} must be one of {allowed}, not {inner!r}")
    return dict(load(inner).options) | options


def settled(name: str, options: Mapping[str, Any], engine: EngineFacts) -> dict[str, Any]:
    """Options of a policy, and of one that it wraps, as they are in an engine; see Policy.settled.

    Args:
        name: see load.
        options: see create.
        engine: see Policy.settled.
    """
    policy = load(name)
    decided = {**options, **policy.settled(options, engine)}
    if not policy.wraps:
        return decided
    inner = options.get(WRAPPED, policy.options[WRAPPED].default)
    own = {key: value for key, value in decided.items() if key in policy.options}
    return {**settled(inner, decided, engine), **own}


def create(
    name: str, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any]
) -> Policy:
    """The policy; a wrapper around the one that its option `of` names.

    An option that both declare is the wrapper's; the other has its default.

    Args:
        name: see load.
        num_sink_tokens: see Policy.
        recent_window: see Policy.
        options: values of what the policy declares; see declared.

    Raises:
        ValueError: an option's value is not allowed.
    """
    policy = load(name)
    settings = {key: options[key] for key in policy.options if key in options}
    if not policy.wraps:
        return policy(num_sink_tokens, recent_window, settings)
    of = settings.get(WRAPPED, policy.options[WRAPPED].default)
    inner_options = {key: value for key, value in options.items() if key not in policy.options}
    inner = create(of, num_sink_tokens, recent_window, inner_options)
    assert inner.evicts, f"{of} does not evict: see declared"
    wrapper: Any = policy
    return wrapper(inner, settings)  # type: ignore[no-any-return]


def available() -> dict[str, str]:
    """Every name with one line about it."""
    lines = {
        FULL: "keeps everything: vLLM as it is",
        PYRAMIDAL: f"larger budgets for the first layers; picks survivors by {DEFAULT_SELECTOR}",
    }
    return lines | {name: _summary(place) for name, place in sorted(_locations().items())}


def _summary(location: str) -> str:
    """First line of a class's docstring. Importing it would import torch, which takes seconds."""
    module, _, attribute = location.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module}: not installed"
    assert spec.origin is not None, f"{module}: no file"
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
    return ""
