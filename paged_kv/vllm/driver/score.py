"""What an engine says of texts: log-probabilities of prompts, and what most likely follows them.

What `paged-kv eval` runs: vLLM in this process, in float32 unless told otherwise.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_kv.vllm.driver.engine import POOL_VARIABLE, ask_for_amx

MOST_AT_ONCE = 8  # sequences that are decoded
CHUNK = 2048  # tokens of their prompts in a step
SLACK_BYTES = 64 << 20  # of the pool: pages of a pyramid's steps that stay empty


def prompt_logprobs(
    model: str,
    policy: Mapping[str, Any],
    texts: Sequence[Sequence[int]],
    chunk: int,
    page_size: int,
    bytes_per_token: int,
    **more: Any,
) -> Iterator[tuple[list[float], float]]:
    """(log-probability of each token but the first, given those before it; seconds), of each text.

    Args:
        model: a model directory.
        policy: options as in additional_config["paged_kv"]; empty for plain vLLM.
        texts: the tokens of each; one engine is started for all, which seconds leaves out.
        chunk: tokens processed in a step.
        page_size: tokens per page.
        bytes_per_token: of the uncompressed cache in float32, all layers.
        more: arguments of vLLM's LLM; they come before ours.
    """
    from vllm import SamplingParams

    longest = max(map(len, texts)) + 1
    llm = _start(model, policy, longest, 1, chunk, page_size, bytes_per_token, more)
    try:
        params = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False
        )
        for tokens in texts:
            start = time.perf_counter()
            output = llm.generate({"prompt_token_ids": list(tokens)}, params, use_tqdm=False)[0]
            seconds = time.perf_counter() - start
            pairs = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
            yield [entry[token].logprob for token, entry in pairs], seconds
    finally:
        _stop(llm)
        del llm
        gc.collect()


def continuations(
    model: str,
    policy: Mapping[str, Any],
    prompts: Sequence[tuple[Sequence[int], int, frozenset[int]]],
    page_size: int,
    bytes_per_token: int,
    most_at_once: int = MOST_AT_ONCE,
    **more: Any,
) -> Iterator[tuple[int, list[int], float]]:
    """(index of a prompt, the most likely tokens after it, seconds), as they are finished.

    Args:
        model: a model directory.
        policy: options as in additional_config["paged_kv"]; empty for plain vLLM.
        prompts: of each its tokens, most new tokens, and tokens that end what follows and are no
            part of it. Several are in the engine at once, and share its time.
        page_size: tokens per page.
        bytes_per_token: of the uncompressed cache in float32, all layers.
        most_at_once: prompts; those of 1 come in order.
        more: arguments of vLLM's LLM; they come before ours.
    """
    from vllm import SamplingParams

    longest = max(len(tokens) + most for tokens, most, _ in prompts)
    at_once = min(len(prompts), most_at_once)
    llm = _start(model, policy, longest, at_once, CHUNK, page_size, bytes_per_token, more)
    try:
        engine = llm.llm_engine
        for index, (tokens, most, stop) in enumerate(prompts):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=most,
                stop_token_ids=sorted(stop),
                ignore_eos=True,
                detokenize=False,
            )
            engine.add_request(str(index), {"prompt_token_ids": list(tokens)}, params)
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index, new = int(output.request_id), list(output.outputs[0].token_ids)
                    seconds, start = time.perf_counter() - start, time.perf_counter()
                    yield index, new[:-1] if new[-1] in prompts[index][2] else new, seconds
    finally:
        _stop(llm)
        del llm
        gc.collect()


def _start(
    model: str,
    policy: Mapping[str, Any],
    max_len: int,
    at_once: int,
    chunk: int,
    page_size: int,
    bytes_per_token: int,
    more: Mapping[str, Any],
) -> Any:
    """An LLM for so many sequences, which takes prompts in chunks."""
    from vllm import LLM

    os.environ.pop(POOL_VARIABLE, None)
    ask_for_amx()
    room = -(-max_len // page_size) * page_size
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "seed": 0,
        "max_model_len": max_len,
        "max_num_seqs": at_once,
        "max_num_batched_tokens": chunk,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "block_size": page_size,
        "kv_cache_memory_bytes": (1 + at_once) * room * bytes_per_token + SLACK_BYTES,
        "additional_config": {"paged_kv": dict(policy)} if policy else {},
    }
    return LLM(model, **{**arguments, **more})


def _stop(llm: Any) -> None:
    """Gives everything back, for a process that starts another engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
