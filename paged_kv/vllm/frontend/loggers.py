"""Has vLLM make our logger for engines with a policy, and for no others.

vLLM would also find it by an entry point, but then it keeps statistics for every server of a user
who has installed this package, also for those who have turned them off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from paged_kv.vllm.plan import PLAN_KEY

_MARK = "_paged_kv_wrapped"


def install() -> None:
    """Servers' engines are asked for our logger. Idempotent."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if not getattr(AsyncLLM, _MARK, False):
        setattr(AsyncLLM, _MARK, True)
        wrapped: Any = with_logger(AsyncLLM.__init__)
        AsyncLLM.__init__ = wrapped


def with_logger(init: Callable[..., None]) -> Callable[..., None]:
    """AsyncLLM's __init__ with one of its `stat_loggers` more, if it keeps statistics at all."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from paged_kv.vllm.watch.stat_logger import PagedStatLogger

        given = signature.bind(*args, **kwargs)
        values = given.arguments
        if values["log_stats"] and PLAN_KEY in (values["vllm_config"].additional_config or {}):
            values["stat_loggers"] = [*(values.get("stat_loggers") or ()), PagedStatLogger]
        init(*given.args, **given.kwargs)

    return wrapped
