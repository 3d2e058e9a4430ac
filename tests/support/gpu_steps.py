"""A step of a GPU's worker on CPU tensors: the caches, the metadata and both kinds of runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import numpy as np
import torch

from paged_kv.core.schedule import Schedule
from paged_kv.vllm.scheduler.spec import PagedSpec

PAGE_SIZE, BUDGET, SINKS = 16, 48, 4
HEAD_SIZE, QUERY_HEADS = 4, 4
NUM_PAGES, LAYERS = 24, ["layer.0", "layer.1", "layer.2"]
SPEC = PagedSpec(
    block_size=PAGE_SIZE,
    num_kv_heads=2,
    head_size=HEAD_SIZE,
    dtype=torch.float32,
    schedule=Schedule(PAGE_SIZE, BUDGET),
)
# Two sequences of one step: the last chunk of a prompt of 100, and a decode of a prompt of 60.
PROMPT_LENS, BEFORE, AFTER = [100, 60], [70, 79], [100, 80]
EVICTED_BEFORE, EVICTED_AFTER = [0, 16], [48, 32]


def metadata(block_size: int = PAGE_SIZE, req_idx: Any = None) -> Any:
    """The step above; page ids count down from the highest, sequence by sequence."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    width = -(-max(AFTER) // block_size)
    last = NUM_PAGES * PAGE_SIZE // block_size - 1
    table = last - torch.arange(2 * width, dtype=torch.int32).view(2, width)
    starts = torch.tensor([0, 30, 31], dtype=torch.int32)
    lens = torch.tensor(AFTER, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
        num_reqs=2,
        num_actual_tokens=31,
        max_query_len=30,
        max_seq_len=max(AFTER),
        block_table_tensor=table,
        slot_mapping=torch.arange(31),
        req_idx=req_idx,
    )


def v1_runner() -> Any:
    lens = np.array([*PROMPT_LENS, 7, 7], dtype=np.int32)  # rows of absent requests follow
    return SimpleNamespace(input_batch=SimpleNamespace(num_prompt_tokens=lens))


def v2_runner() -> Any:
    """Its table of requests is in another order than the batch."""
    lens = np.array([7, PROMPT_LENS[1], 7, PROMPT_LENS[0]], dtype=np.int32)
    return SimpleNamespace(req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=lens)))


RUNNERS = {"V1": (v1_runner, None), "V2": (v2_runner, np.array([3, 1]))}


def caches(layout: str = "LBHNC", kernel_page_size: int = PAGE_SIZE) -> list[torch.Tensor]:
    """Views [pages, heads, page size, content] of vLLM's making, every number another one."""
    from vllm.v1.kv_cache_interface import (
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    member = KVCacheLayout[layout]
    size = SPEC.page_size_bytes * NUM_PAGES * len(LAYERS)
    raw = torch.randperm(size // 4, generator=torch.Generator().manual_seed(0)).float()
    strides = compute_layout_strides(SPEC, NUM_PAGES, len(LAYERS), member)
    tensor = KVCacheTensor(size, LAYERS, layer_stride=strides[0], block_stride=strides[1])
    return create_kv_cache_views(
        raw.view(torch.int8), SPEC, NUM_PAGES, member, tensor, kernel_page_size
    )


def attention_layer(cache: torch.Tensor) -> Any:
    """What a PageStore is made of of vLLM's Attention layer."""
    return SimpleNamespace(
        kv_cache=cache,
        kv_cache_dtype="auto",
        head_size=HEAD_SIZE,
        num_heads=QUERY_HEADS,
        num_kv_heads=SPEC.num_kv_heads,
        dtype=torch.float32,
        impl=SimpleNamespace(scale=0.5),
    )


def entries(cache: torch.Tensor, table: torch.Tensor, row: int) -> torch.Tensor:
    """[slots, heads, content] of a sequence, in logical order."""
    pages = cache[table[row].long()]  # [pages, heads, page size, content]
    return pages.transpose(1, 2).flatten(0, 1).clone()


LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
# (layout, page size of the kernel)
CASES = [*((layout, PAGE_SIZE) for layout in LAYOUTS), ("LBHNC", 8), ("LBNHC", 8)]


def scheduler_output(new: dict[str, int]) -> Any:
    """What a step's scheduler output says of requests that come (with their hits) and go."""
    return SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=hit) for name, hit in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            resumed_req_ids=set(), req_ids=[], num_computed_tokens=[]
        ),
    )
