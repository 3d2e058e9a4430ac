"""Requests whose output is given: how likely an engine finds it, whatever it would say itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from paged_kv.vllm.driver.workload import Tokens

_KEY = "paged_kv_forced"  # of a request's extra_args


class Forcing(AdapterLogitsProcessor):
    """Leaves one token to choose. vLLM's log-probabilities are those of before."""

    def is_argmax_invariant(self) -> bool:
        """It is not: greedy requests must be forced, too."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """(output so far, logits [vocabulary]) -> logits; None for requests that are not forced."""
        tokens = (params.extra_args or {}).get(_KEY)
        if tokens is None:
            return None

        def force(output: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[tokens[len(output)]] = 0
            return forced

        return force


def sampled(llm: Any, prompts: Sequence[Tokens], num_tokens: int, seed: int) -> list[Any]:
    """Outputs of each prompt, drawn from the model's own distribution, with log-probabilities."""
    params = [
        SamplingParams(
            temperature=1.0, seed=seed + index, max_tokens=num_tokens, ignore_eos=True, logprobs=0
        )
        for index in range(len(prompts))
    ]
    return _outputs(llm, prompts, params)


def forced(llm: Any, prompts: Sequence[Tokens], tokens: Sequence[Tokens]) -> list[Any]:
    """The same of given tokens; llm has Forcing among its logits_processors."""
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(given),
            ignore_eos=True,
            logprobs=0,
            extra_args={_KEY: list(given)},
        )
        for given in tokens
    ]
    return _outputs(llm, prompts, params)


def _outputs(llm: Any, prompts: Sequence[Tokens], params: list[SamplingParams]) -> list[Any]:
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [result.outputs[0] for result in llm.generate(requests, params, use_tqdm=False)]


def logprobs(output: Any) -> list[float]:
    """Of each token of an output."""
    return [
        entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)
    ]
