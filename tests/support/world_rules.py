"""How a world of integers is set up, and vLLM's real scheduler for it (see worlds.py)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import Schedule
from paged_kv.vllm.plan import PLAN_KEY, GroupedPlan, get_plan
from paged_kv.vllm.scheduler import limits
from paged_kv.vllm.scheduler.registration import register
from paged_kv.vllm.scheduler.scheduler import PagedAsyncScheduler, PagedScheduler
from paged_kv.vllm.scheduler.spec import PagedSpec
from paged_kv.vllm.swap.commands import Capacity
from paged_kv.vllm.swap.options import set_connector
from paged_kv.vllm.swap.scheduler import SwapAsyncScheduler, SwapScheduler

Budget = tuple[int, int, int]  # minimum, numerator, denominator


@dataclass(frozen=True)
class Rules:
    """How a world is set up.

    Args:
        num_pages: of the pool, vLLM's null page included.
        budgets: one per layer group.
        page_size: tokens per page.
        full_groups: groups of layers that keep everything (skip_layers).
        compress_prefill: as in CompressionConfig.
        caching: prefix caching.
        max_len: max_model_len.
        batch: max_num_batched_tokens.
        seqs: max_num_seqs.
        asynchronous: a step is scheduled while the one before it is in flight.
        private_hits: as in PagedSpec.
        priorities: requests have them; else the one that came last is preempted.
        swap: host slots and file slots for preempted requests; None for no swap.
        pressure: requests shrink when pages run out (start: pressure).
        lead: as in PagedSpec.
        ring_slots: that a swapped request takes beside its pages'.
        ranks: workers that have tiers.
    """

    num_pages: int = 40
    budgets: tuple[Budget, ...] = ((8, 0, 1),)
    page_size: int = 4
    full_groups: int = 0
    compress_prefill: bool = False
    caching: bool = True
    max_len: int = 64
    batch: int = 16
    seqs: int = 6
    asynchronous: bool = False
    private_hits: bool = False
    priorities: bool = False
    swap: tuple[int, int] | None = None
    pressure: bool = False
    lead: int = 1
    ring_slots: int = 0
    ranks: int = 1

    @property
    def schedules(self) -> list[Schedule | None]:
        """By group; None keeps everything."""
        compressed = [Schedule(self.page_size, *b, self.compress_prefill) for b in self.budgets]
        return [*compressed, *[None] * self.full_groups]


@functools.cache
def _model_config() -> ModelConfig:
    directory = Path(tempfile.mkdtemp(prefix="paged_kv_world_"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 8,
        "max_position_embeddings": 1 << 20,
        "vocab_size": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(model=str(directory), dtype="float32", skip_tokenizer_init=True)


def make_scheduler(rules: Rules, *others: KVCacheSpec) -> Any:
    """Our scheduler as an engine would make it, with one layer per group; others: further ones."""
    register()
    init_none_hash(sha256)
    vllm_config = _vllm_config(rules)
    full = FullAttentionSpec(
        block_size=rules.page_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    specs = [
        PagedSpec.from_full(full, s, private_hits=rules.private_hits, lead=rules.lead)
        if s
        else full
        for s in rules.schedules
    ]
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate([*specs, *others])]
    classes = (PagedScheduler, PagedAsyncScheduler)
    if not rules.budgets:
        classes = (SwapScheduler, SwapAsyncScheduler)
    scheduler = classes[rules.asynchronous](
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(rules.num_pages, [], groups),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=rules.page_size,
        hash_block_size=rules.page_size,
        log_stats=True,
    )
    if rules.swap:
        scheduler.connector.set_xfer_handshake_metadata(dict(enumerate(capacities(rules))))
    return scheduler


def capacities(rules: Rules) -> list[Capacity]:
    """What the tiers of each rank hold: no two the same."""
    host, file = rules.swap or (0, 0)
    return [
        Capacity(64, host + rank, file + rank * (file > 0), rules.ring_slots)
        for rank in range(rules.ranks)
    ]


def _vllm_config(rules: Rules) -> VllmConfig:
    model = copy.copy(_model_config())
    model.max_model_len = rules.max_len
    cache = CacheConfig(block_size=rules.page_size, enable_prefix_caching=rules.caching)
    plan = GroupedPlan(
        rules.page_size,
        rules.compress_prefill,
        dict(enumerate(rules.budgets)),
        num_groups=len(rules.budgets),
        num_other_groups=rules.full_groups,
        layers_per_page=1,
        waits_for_pressure=rules.pressure,
    )
    args = SimpleNamespace(kv_transfer_config=None)
    if rules.swap:
        set_connector(args)
    vllm_config = VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=rules.seqs,
            max_num_batched_tokens=rules.batch,
            max_model_len=rules.max_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            watermark=0.0,
            policy="priority" if rules.priorities else "fcfs",
        ),
        kv_transfer_config=args.kv_transfer_config,
        additional_config={PLAN_KEY: plan.to_json(), "paged_kv": _options(rules)},
    )
    # The CPU platform has turned it off; the scheduler itself needs no GPU.
    vllm_config.scheduler_config.async_scheduling = rules.asynchronous
    cache.block_size = rules.page_size
    cache.num_gpu_blocks = rules.num_pages
    return vllm_config


def _options(rules: Rules) -> dict[str, Any]:
    """What a user would have asked for; what is kept says the plan."""
    return CompressionConfig(policy="streaming", swap_space=float(bool(rules.swap))).to_dict()


def max_prompt_len(rules: Rules, scheduler: Any) -> int:
    """Longest prompt that the scheduler takes."""
    limit = rules.max_len - 1
    if rules.budgets:
        limit = min(limits.max_prompt_len(scheduler.vllm_config, rules.num_pages) or limit, limit)
    return limit


def start_up_pages(scheduler: Any) -> int:
    """What vLLM's start-up check wants to see in the pool."""
    vllm_config, kv_cache_config = scheduler.vllm_config, scheduler.kv_cache_config
    longest = None
    if get_plan(vllm_config).budgets:
        longest = limits.max_prompt_len(vllm_config, kv_cache_config.num_blocks)
    total = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, PagedSpec):  # as PagedWorker does
            spec = dataclasses.replace(spec, max_prompt_len=longest)
        total += spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
    return total
