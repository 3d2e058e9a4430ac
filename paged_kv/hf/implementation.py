"""The attention implementation of a model, changed for as long as somebody uses ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_kv.hf import attention_function  # noqa: F401, registers the name
from paged_kv.hf.masks import NAME

_users: dict[int, list[Any]] = {}  # by id of a config: [users, name before]


def use(config: Any) -> Callable[[], None]:
    """The model of this config calls our attention function from now on.

    Args:
        config: what its attention layers read.

    Returns:
        undoes it; the last of several users gets the former implementation back.
    """
    users = _users.setdefault(id(config), [0, config._attn_implementation])
    users[0] += 1
    config._attn_implementation = NAME

    def restore() -> None:
        users[0] -= 1
        if users[0] == 0:
            del _users[id(config)]
            if config._attn_implementation == NAME:
                config._attn_implementation = users[1]

    return restore
