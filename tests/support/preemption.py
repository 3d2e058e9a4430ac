"""Requests that a vLLM engine preempts: prompts, resets on the way, what was computed again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from engines import Tokens, recorded_chunks, scheduler


def prompts_of(lengths: list[int], seed: int, shared: int = 0) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tokens:
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    prefix = tokens(shared)
    return [prefix + tokens(length - shared) for length in lengths]


def run(llm: Any, prompts: list[Tokens], max_tokens: int, reset_at: tuple[int, ...] = ()) -> Any:
    """Chunks and outputs of the prompts, all sent at once; resets at these steps."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    outputs = {}
    with recorded_chunks(llm) as chunks:
        for index, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        steps = 0
        while llm.llm_engine.has_unfinished_requests():
            if steps in reset_at:
                assert scheduler(llm).reset_prefix_cache(reset_running_requests=True)
            outputs.update({int(o.request_id): o.outputs[0] for o in llm.llm_engine.step()})
            steps += 1
            assert steps < 4 * len(prompts) * (max_tokens + 10), "no end in sight"
    return list(chunks.values()), [outputs[index] for index in range(len(prompts))]


def num_restarts(chunks: list[list[tuple[int, int]]]) -> int:
    return sum(start < end for own in chunks for (_, end), (start, _) in pairwise(own))
