"""Refuses requests that could never run, where their sender can be told: in vLLM's front end."""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from paged_kv.vllm import limits

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
    if limits.PLAN_KEY not in (vllm_config.additional_config or {}):
        return
    plan = limits.get_plan(vllm_config)
    if not (plan.budgets or plan.residual_pages):
        return
    num_pages = vllm_config.cache_config.num_gpu_blocks  # of all engines, under data parallelism
    engines = max(1, vllm_config.parallel_config.data_parallel_size)
    try:
        limits.check_resumable(request.resumable)
        if num_pages and plan.budgets:
            prompt = request.prompt_token_ids
            num_tokens = len(prompt if prompt is not None else request.prompt_embeds)
            limits.check_prompt(vllm_config, num_tokens, num_pages // engines)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
