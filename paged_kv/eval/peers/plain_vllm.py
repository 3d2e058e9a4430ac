"""vLLM as it is, as a peer of ours in evaluations: an engine in this process, which keeps all.

It runs in the dtype in which a server would run the model, not in float32 as our engines do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from paged_kv.bench import held
from paged_kv.bench.cases import PEERS, PLAIN_FP8, number_bytes
from paged_kv.bench.settings import AUTO, kv_bytes_per_token, resolved_dtype
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.eval.prompt import Answer, Prompt


def check(name: str) -> dict[str, str]:
    """No versions beside those of every row. Raises ValueError: vLLM is missing, or has no fp8."""
    if find_spec("vllm") is None:
        raise ValueError(f"peer {name} needs vllm, which is not installed")
    if name == PLAIN_FP8:
        import torch

        if not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()):
            raise ValueError(f"peer {name}: on processors vLLM's fp8 pages need AVX-512")
    return {}


def answers(name: str, model_dir: Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """One answer for each prompt, in order, one prompt at a time.

    Args:
        name: one of bench.cases.PEERS.
        model_dir: a model directory.
        prompts: what to answer. All have targets, or none has.

    Raises:
        ValueError: see check; or vLLM refuses the model.
    """
    check(name)
    from paged_kv.vllm.driver.engine import engine_environment
    from paged_kv.vllm.driver.score import CHUNK, continuations, prompt_logprobs

    os.environ.update(engine_environment())
    dtype = resolved_dtype(AUTO)
    arguments = {"dtype": dtype, "kv_cache_dtype": PEERS[name]}
    model, page_size = str(model_dir), DEFAULT_PAGE_SIZE
    room = kv_bytes_per_token(model_dir, "float32")
    asked = [[*prompt.context, *prompt.question] for prompt in prompts]
    if any(prompt.targets for prompt in prompts):
        texts = [[*asks, *prompt.targets] for asks, prompt in zip(asked, prompts, strict=True)]
        scored = prompt_logprobs(model, {}, texts, CHUNK, page_size, room, **arguments)
        for prompt, (logprobs, seconds) in zip(prompts, scored, strict=True):
            nll = -sum(logprobs[-len(prompt.targets) :]) / len(prompt.targets)
            yield Answer([], *_held(name, model_dir, len(prompt.context), dtype), seconds, nll)
        return
    requests = [
        (asks, prompt.max_new_tokens, prompt.stop)
        for asks, prompt in zip(asked, prompts, strict=True)
    ]
    found = continuations(model, {}, requests, page_size, room, most_at_once=1, **arguments)
    for prompt, (_, tokens, seconds) in zip(prompts, found, strict=True):
        yield Answer(tokens, *_held(name, model_dir, len(prompt.context), dtype), seconds)


def _held(name: str, model_dir: Path, num_tokens: int, dtype: str) -> tuple[float, int]:
    """Entries per layer, and bytes of all, after so many tokens."""
    import torch

    config, page_size = CompressionConfig(), DEFAULT_PAGE_SIZE
    kept = held.entries(held.layer_schedules(config, model_dir, page_size), num_tokens, 0)
    number = number_bytes(name)
    each = held.entry_bytes(config, model_dir, page_size, getattr(torch, dtype), number)
    return sum(kept) / len(kept), sum(map(int.__mul__, kept, each))
