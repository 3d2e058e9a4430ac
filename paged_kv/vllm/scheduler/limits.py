"""What fits: the longest prompt that can be admitted, and the pieces that prompts come in."""

from __future__ import annotations

from typing import Any

from paged_kv.core import page_counts
from paged_kv.vllm.plan import get_plan


def prompt_chunk(vllm_config: Any) -> int:
    """Most tokens of one prompt in a step under compress_prefill: it holds them beside its budget.

    We keep to vLLM's own setting for it also where a request is alone.
    """
    scheduler = vllm_config.scheduler_config
    return page_counts.prompt_chunk(
        get_plan(vllm_config).schedules(),
        vllm_config.model_config.max_model_len,
        scheduler.long_prefill_token_threshold,
        scheduler.max_num_batched_tokens,
    )


def max_prompt_len(vllm_config: Any, num_pages: int) -> int | None:
    """See GroupedPlan.longest_prompt."""
    max_len = vllm_config.model_config.max_model_len
    return get_plan(vllm_config).longest_prompt(max_len, num_pages)


def check_request(vllm_config: Any, request: Any, num_pages: int | None) -> None:
    """Refuses a request that can never run.

    Args:
        vllm_config: with a plan.
        request: an EngineCoreRequest or a Request.
        num_pages: of an engine's pool, vLLM's null page included; None where nobody knows.

    Raises:
        ValueError: says why, and what would help.
    """
    plan = get_plan(vllm_config)
    if not (plan.budgets or plan.residual_pages):
        return
    if request.resumable:  # its prompt, hence its schedule, grows
        raise ValueError(
            "streaming-input (resumable) requests do not work with a kv-policy or residual_pages"
        )
    if num_pages and plan.budgets:
        prompt = request.prompt_token_ids
        num_tokens = len(prompt if prompt is not None else request.prompt_embeds)
        check_prompt(vllm_config, num_tokens, num_pages)


def check_prompt(vllm_config: Any, prompt_len: int, num_pages: int) -> None:
    """Raises ValueError for a prompt that would wait for pages for ever."""
    limit = max_prompt_len(vllm_config, num_pages)
    if limit is not None and prompt_len > limit:
        raise ValueError(
            f"the prompt has {prompt_len} tokens, but the KV cache holds prompts of at most "
            f"{limit} ({num_pages - 1} pages): a prompt is kept whole until its end. Set "
            "compress_prefill to true in kv-policy-config, or give the KV cache more memory"
        )
