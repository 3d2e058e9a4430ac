"""Answers by vLLM: one engine for each case, in which several prompts are at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import CompressionConfig
from paged_kv.eval.cases import Case, context_of
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.running import Todo
from paged_kv.vllm.driver.score import continuations


def run_all(
    prompts: Sequence[Prompt], cases: Sequence[Case], todo: Todo, bar: Any
) -> Iterator[tuple[int, int, Answer]]:
    """Answers of a case to all prompts, then of the next; see RunAll.

    Prompts have no questions: an engine compresses a prompt at its end.
    """
    bar.reset(len(prompts) * len(cases))
    for index, case in enumerate(cases):
        bar.set_description(str(case))
        wanted = [number for number in range(len(prompts)) if todo(number, index)]
        bar.update(len(prompts) - len(wanted))
        if not wanted:
            continue
        # Held whole until its end, however it is chunked: what one chunk would be.
        config = replace(case.config, compress_prefill=False)
        options = {} if config == CompressionConfig() else config.to_dict()
        asked = [_request(prompts[number], case) for number in wanted]
        found = continuations(
            str(case.model),
            options,
            asked,
            case.page_size,
            kv_bytes_per_token(case.model, "float32"),
        )
        for place, tokens, seconds in found:
            bar.update()
            held = case.held(len(asked[place][0]))
            yield wanted[place], index, Answer(tokens, held.kept, held.cache_bytes, seconds)


def _request(prompt: Prompt, case: Case) -> tuple[list[int], int, frozenset[int]]:
    assert not prompt.question
    return context_of(case, prompt.context), prompt.max_new_tokens, prompt.stop
