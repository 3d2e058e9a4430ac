"""Refuses requests that could never run, where their sender can be told: in vLLM's front end."""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from paged_kv.vllm.plan import PLAN_KEY
from paged_kv.vllm.scheduler import limits

_MARK = "_paged_kv_wrapped"


def install() -> None:
    """Has InputProcessor check requests; engines without a policy pass through. Idempotent."""
    validators = getattr(InputProcessor, "validators", None)  # vLLM with our source patch
    if validators is not None:
        if _check not in validators:
            validators.append(_check)
        return
    if getattr(InputProcessor, _MARK, False):
        return
    setattr(InputProcessor, _MARK, True)
    process_inputs: Any = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def checked(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        _check(self.vllm_config, request)
        return request

    InputProcessor.process_inputs = checked


def _check(vllm_config: Any, request: Any) -> None:
    if PLAN_KEY not in (vllm_config.additional_config or {}):
        return
    try:
        limits.check_request(vllm_config, request, _pages_of_an_engine(vllm_config))
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None


def _pages_of_an_engine(vllm_config: Any) -> int | None:
    """vLLM adds up what the engines report that this process talks to (MPClient)."""
    num_pages, parallel = vllm_config.cache_config.num_gpu_blocks, vllm_config.parallel_config
    engines = parallel.data_parallel_size
    if parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    if parallel.data_parallel_rank_local is not None:  # one engine in each process
        engines = 1
    return num_pages and num_pages // max(1, engines)
