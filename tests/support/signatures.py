"""What other packages' functions and classes look like: for tests of what we rely on in them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import engines  # noqa: F401  vLLM's environment


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def begins_with(function: Any, *names: str) -> None:
    """Its first parameters."""
    found = parameters(function)[: len(names)]
    assert found == list(names), f"{function.__qualname__} now takes {parameters(function)}"


def takes(function: Any, *names: str) -> None:
    """Some of its parameters."""
    missing = set(names) - set(parameters(function))
    assert not missing, f"{function.__qualname__} no longer takes {missing}"


def has_fields(cls: type, *names: str) -> None:
    missing = set(names) - {field.name for field in dataclasses.fields(cls)}
    assert not missing, f"{cls.__name__} no longer has {missing}"
