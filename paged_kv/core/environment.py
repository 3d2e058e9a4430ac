"""Options from the environment: a variable of its own for some, and one for all others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from paged_kv.core.options import Option, parse_json

CONFIG_VARIABLE = "PAGED_KV_POLICY_CONFIG"  # a JSON object of the options without a variable


def read_environment(options: Mapping[str, Option]) -> dict[str, Any]:
    """The values that the environment has; a variable that is empty is not set.

    Args:
        options: by name; those with a variable are read from it, and checked.

    Returns:
        values by name; those from CONFIG_VARIABLE as they are there, whatever their names.

    Raises:
        ValueError: names the variable.
    """
    config = os.environ.get(CONFIG_VARIABLE, "")
    values = parse_json(config, CONFIG_VARIABLE) if config.strip() else {}
    for name, option in options.items():
        if not option.variable:
            continue
        if name in values:
            raise ValueError(f"{CONFIG_VARIABLE} must not have {name}: use {option.variable}")
        if text := os.environ.get(option.variable, "").strip():
            values[name] = _read(option, text)
    return values


def _read(option: Option, text: str) -> Any:
    try:
        return option.read(option.variable, text)
    except ValueError as error:
        if option.variable in str(error):
            raise
        raise ValueError(f"{option.variable}: {error}") from None
