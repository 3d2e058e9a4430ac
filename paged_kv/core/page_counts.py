"""How many pages sequences hold under a schedule: what vLLM's processes reserve and report, and
what `paged-kv capacity` says before there is an engine.
"""

from __future__ import annotations

from collections.abc import Iterable

from paged_kv.core.schedule import Schedule, cdiv

LEAST_CHUNK = 512  # tokens of a prompt's piece under compress_prefill, if the user says nothing


def prompt_chunk(
    schedules: Iterable[Schedule], max_len: int, threshold: int, max_num_batched_tokens: int
) -> int:
    """Most tokens of one prompt in a step under compress_prefill: it holds them beside its budget.

    Args:
        schedules: of the compressed layers.
        max_len: tokens of the longest sequence.
        threshold: vLLM's setting for it, long_prefill_token_threshold. Where that is 0: the largest
            budget, which at most doubles what a request holds.
        max_num_batched_tokens: of a step, all requests together.
    """
    if threshold == 0:
        threshold = max([LEAST_CHUNK, *(schedule.budget(max_len) for schedule in schedules)])
    return min(threshold, max_num_batched_tokens)


def most_pages(
    schedule: Schedule, block_size: int, num_tokens: int, prompt_len: int, chunk: int
) -> int:
    """Most pages of a layer group that a sequence holds on its way to num_tokens.

    Args:
        schedule: of the group's layers.
        block_size: entries of a page.
        num_tokens: where the sequence ends.
        prompt_len: tokens that are held whole before anything is dropped; 0 for one that decodes.
        chunk: most tokens of a step.
    """
    return cdiv(schedule.max_retained(num_tokens, prompt_len, chunk), block_size)


def window_pages(window: int, block_size: int, num_tokens: int, in_flight: int) -> int:
    """Most pages of a layer group with a sliding window that a sequence holds as it decodes.

    vLLM has freed by then what lies before the window of the oldest step in flight (its
    SlidingWindowManager). Neither begins with a page.

    Args:
        window: its tokens.
        block_size: entries of a page.
        num_tokens: where the sequence ends.
        in_flight: most tokens of a sequence in the steps that run at once.
    """
    held = cdiv(window + in_flight - 2, block_size) + 1
    return min(held, cdiv(num_tokens, block_size))


def reserved_pages(
    schedule: Schedule, block_size: int, max_len: int, in_flight: int, max_prompt_len: int | None
) -> int:
    """Most pages of a layer group that any request can hold: vLLM's check and its concurrency.

    Args:
        schedule: of the group's layers.
        block_size: entries of a page.
        max_len: tokens of the longest sequence.
        in_flight: most tokens of a sequence in the steps that run at once.
        max_prompt_len: the longest prompt that is admitted; None for no limit.
    """
    whole = cdiv(max_len, block_size)
    compressed = most_pages(schedule, block_size, max_len, 0, in_flight) + 1
    if schedule.compress_prefill:
        return min(compressed, whole)
    limit = whole if max_prompt_len is None else max_prompt_len // block_size
    return min(max(compressed, limit), whole)
