"""How likely an engine finds texts: the log-probabilities of prompts, in chunks of a given size.

What `paged-kv eval perplexity --engine vllm` runs: vLLM in this process, in float32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SLACK_BYTES = 64 << 20  # of the pool: pages of a pyramid's steps that stay empty


def prompt_logprobs(
    model: str,
    policy: Mapping[str, Any],
    texts: Sequence[Sequence[int]],
    chunk: int,
    page_size: int,
    bytes_per_token: int,
) -> Iterator[tuple[list[float], float]]:
    """(log-probability of each token but the first, given those before it; seconds), of each text.

    Args:
        model: a model directory.
        policy: options as in additional_config["paged_kv"]; empty for plain vLLM.
        texts: the tokens of each; one engine is started for all, which seconds leaves out.
        chunk: tokens processed in a step.
        page_size: tokens per page.
        bytes_per_token: of the uncompressed cache in float32, all layers.
    """
    from vllm import SamplingParams

    llm = _start(model, policy, max(map(len, texts)), chunk, page_size, bytes_per_token)
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


def _start(
    model: str,
    policy: Mapping[str, Any],
    num_tokens: int,
    chunk: int,
    page_size: int,
    bytes_per_token: int,
) -> Any:
    """An LLM for one sequence that takes a prompt in chunks."""
    from vllm import LLM

    room = -(-(num_tokens + 1) // page_size) * page_size
    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        max_model_len=num_tokens + 1,
        max_num_seqs=1,
        max_num_batched_tokens=chunk,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        block_size=page_size,
        kv_cache_memory_bytes=2 * room * bytes_per_token + SLACK_BYTES,
        additional_config={"paged_kv": dict(policy)} if policy else {},
    )


def _stop(llm: Any) -> None:
    """Gives everything back, for a process that starts another engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
