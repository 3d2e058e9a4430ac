"""generate_batch: many prompts of any lengths at once, under a policy, in a bounded pool.

The scheduler, request states, logits processors and sampling are those of transformers' continuous
batching; the pages are ours (engine.py). Everything runs in the caller's thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    OutputRouter,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.schedule import NEVER
from paged_kv.hf import compat, dispatch
from paged_kv.hf.arguments import read_options
from paged_kv.hf.batch import arguments, layers
from paged_kv.hf.batch.engine import BatchCache
from paged_kv.hf.batch.page_counts import PageCounts
from paged_kv.hf.batch.processor import BatchProcessor, BatchScheduler
from paged_kv.hf.pool import PagePool

Tokens = list[int]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    policy: str | CompressionConfig | None = None,
    budget: Any = None,
    *,
    num_pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    max_requests: int = 64,
    max_batch_tokens: int = 512,
    generation_config: GenerationConfig | None = None,
    progress_bar: bool = True,
    **options: Any,
) -> list[Tokens]:
    """What the model says after each prompt: token ids, the end-of-sequence token included.

    Args:
        model: a causal LM of transformers. Nothing of it is changed.
        prompts: token ids of each, without padding.
        policy: a name or a CompressionConfig; None: from the environment, as PagedCache.
        budget: entries kept per sequence and layer, or the fraction that is kept.
        num_pages: most pages held at once, of page_size entries of one layer; requests without room
            wait, or make way and are computed again later. With start=pressure others shrink to
            their budgets before that. None: as many as are needed.
        page_size: entries per page.
        max_requests: most requests in a step.
        max_batch_tokens: most tokens in a step; a longer prompt takes several steps.
        generation_config: as in generate().
        progress_bar: whether to show on stderr how many requests are done.
        options: of generate() (max_new_tokens, do_sample, temperature, eos_token_id, ...) and of
            the policy (num_sink_tokens, compress_prefill, observation_window, ...).

    Returns:
        the new tokens of each prompt, in order; num_return_sequences lists of each, if given.

    Raises:
        ValueError: an option or prompt that is wrong, or a prompt for which num_pages is too small
            (PoolFull). Nothing has run then.
    """
    limits = {"max_requests": max_requests, "max_batch_tokens": max_batch_tokens}
    for name, value in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
    pool = PagePool(num_pages, page_size)
    of_generate, of_policy = arguments.split(options)
    compression = read_options(policy, budget, of_policy)
    chosen = arguments.generation_config(model, generation_config, of_generate)
    requests = arguments.make_requests(model, prompts, chosen)
    cache = _cache(model, compression, pool, requests, limits)
    if not requests:
        return []
    with _processor(model, cache, chosen, max_requests) as processor:
        for request in requests:
            processor.scheduler.add_waiting_request(request)
        return _run(processor, model, len(requests), progress_bar)


def _cache(
    model: Any,
    compression: CompressionConfig,
    pool: PagePool,
    requests: Sequence[Any],
    limits: Mapping[str, int],
) -> BatchCache:
    """Without a row yet.

    Raises:
        ValueError: a model or budgets that do not go together; PoolFull: a request could not even
            run alone.
    """
    parts = layers.make_parts(model, compression, pool)
    schedules = [schedule for part in parts for schedule in layers.schedules(part)]
    chunk, has_residual = limits["max_batch_tokens"], compression.residual_pages > 0
    waits = compression.waits_for_pressure
    page_counts = PageCounts(schedules, pool.page_size, pool.num_pages, chunk, has_residual, waits)
    prompt_lens = {request.request_id: len(request.initial_tokens) for request in requests}
    lengths = []
    for index, request in enumerate(requests):
        prompt_len = len(request.initial_tokens)
        length = prompt_len + request.max_new_tokens - 1
        lengths.append((length, NEVER if waits else prompt_len))
        page_counts.check(index, length, prompt_len)
    layers.check_rope(parts[0], max((length for length, _ in lengths), default=1))
    if pool.num_pages is None:  # memory that grows would be copied each time
        pool.num_pages = page_counts.enough(lengths, limits["max_requests"])
    return BatchCache(parts, page_counts, prompt_lens, limits["max_batch_tokens"])


@contextmanager
def _processor(
    model: Any, cache: BatchCache, chosen: Any, max_requests: int
) -> Iterator[BatchProcessor]:
    """transformers' part. At the end all pages are free."""
    dispatch.install()
    config = copy.deepcopy(model.config.get_text_config())
    config._attn_implementation = "eager"  # one for which transformers prepares no masks
    settings = ContinuousBatchingConfig(
        max_batch_tokens=cache.max_batch_tokens,
        max_requests_per_batch=min(max_requests, cache.max_batch_tokens),
        max_blocks_per_request=0,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    processors = arguments.logits_processors(model, chosen)
    try:
        yield BatchProcessor(
            cache=cache,
            config=config,
            generation_config=chosen,
            continuous_batching_config=compat.resolve_batching(
                config, settings, processors.do_processing, model.device
            ),
            logit_processor=processors,
            input_queue=None,
            cancel_queue=None,
            output_router=OutputRouter(),
            background_thread_status=BackgroundThreadStatus(),
            model_device=model.device,
            model_dtype=model.dtype,
            scheduler=BatchScheduler(
                cache, settings.safety_margin, settings.max_requests_per_batch
            ),
            distributed_helper=DistributedHelper(None, None),
        )
    finally:
        for part in cache.parts:
            part.release()


def _run(processor: BatchProcessor, model: Any, count: int, progress_bar: bool) -> list[Tokens]:
    """Steps until all requests are done: their new tokens, in order."""
    tokens: dict[int, Tokens] = {}
    finished = processor.output_router.output_queue
    with tqdm(total=count, unit="request", disable=not progress_bar) as bar:
        while processor.has_pending_requests():
            ready = processor.prepare_next_batch()
            assert ready, "requests are waiting, and none of them can run"
            processor._generation_step(model)
            processor.update_batch()
            while not finished.empty():
                output = finished.get()
                tokens[int(output.request_id)] = output.generated_tokens
                bar.update()
    return [tokens[index] for index in range(count)]
