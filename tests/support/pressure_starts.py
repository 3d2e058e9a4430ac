"""From where on vLLM's scheduler has held each request to its budget, as it told the workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from engines import scheduler

from paged_kv.core.schedule import NEVER

ENGINE: dict[str, Any] = {  # chunks of prompts that end anywhere in a page
    "max_num_batched_tokens": 100,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}


class Told(NamedTuple):
    """What the workers were told of a request.

    Args:
        start: tokens before which nothing is dropped.
        run: how often the request had begun anew by then.
        token: the first one of the step that brought the news: from there on it is observed.
    """

    start: int = NEVER
    run: int = 1 << 30
    token: int = 0


Starts = dict[str, Told]


def loop_arguments(starts: Starts | None, name: str, prompt_len: int) -> tuple[Any, ...]:
    """(start, scored) of the loop of a request; see policy_loop."""
    if starts is None:
        return prompt_len, (0, 0)
    start, *scored = starts[name]
    return start, tuple(scored)


@contextmanager
def recorded_starts(llm: Any) -> Iterator[Starts | None]:
    """What is told of each request; None where starts are the ends of prompts."""
    target = scheduler(llm)
    if getattr(target, "pressure", None) is None:
        yield None
        return
    told: dict[str, Told] = defaultdict(Told)
    news: dict[str, int] = {}  # of requests that have not been in a step since
    ends: dict[str, int] = defaultdict(int)
    runs: dict[str, int] = defaultdict(int)
    schedule = target.schedule

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        news.update(getattr(output, "paged_kv_starts", {}))
        for name, count in output.num_scheduled_tokens.items():
            end = target.requests[name].num_computed_tokens
            runs[name] += end - count < ends[name]
            ends[name] = end
            if name in news:
                told[name] = Told(news.pop(name), runs[name], end - count)
        return output

    target.schedule = recording
    try:
        yield told
    finally:
        target.schedule = schedule
