"""vLLM's own quantized pages on GPUs: compaction moves their entries with their scales.

int8, int4 and fp8 with a scale per token and KV head keep each scale behind its data, inside the
entry's content: vLLM's backend says how long that is and where the scales lie in it. Here its own
functions make the pages and the views, on CPU tensors; numbers are bytes, since only the backend's
kernels give them a meaning.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import pytest
import torch
from gpu_steps import (
    AFTER,
    BEFORE,
    CASES,
    EVICTED_AFTER,
    EVICTED_BEFORE,
    LAYERS,
    NUM_PAGES,
    PAGE_SIZE,
    SINKS,
    SPEC,
    metadata,
    scheduler_output,
    v1_runner,
)

from paged_kv.policies.random import Random
from paged_kv.policies.streaming import Streaming
from paged_kv.vllm.scheduler.spec import PagedSpec
from paged_kv.vllm.worker import layer_group
from paged_kv.vllm.worker.step import Compactor

HEAD_SIZE, KV_HEADS, RECENT = 32, 2, 8
FORMATS = ["int8_per_token_head", "int4_per_token_head", "fp8_per_token_head"]


def spec_of(cache_dtype: str) -> PagedSpec:
    """As a worker has it: the layer's spec, the backend's packing, our schedule."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    full = FullAttentionSpec(
        block_size=PAGE_SIZE,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[cache_dtype],
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )
    return PagedSpec.from_full(TritonAttentionBackend.customize_spec(full), SPEC.schedule)


def make_caches(spec: PagedSpec, layout: str, kernel_page_size: int) -> list[torch.Tensor]:
    from vllm.v1.kv_cache_interface import (
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    member = KVCacheLayout[layout]
    size = spec.page_size_bytes * NUM_PAGES * len(LAYERS)
    strides = compute_layout_strides(spec, NUM_PAGES, len(LAYERS), member)
    tensor = KVCacheTensor(size, LAYERS, layer_stride=strides[0], block_stride=strides[1])
    raw = torch.full((size,), 99, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, NUM_PAGES, member, tensor, kernel_page_size)


def backend_views(spec: PagedSpec, cache: torch.Tensor) -> list[torch.Tensor]:
    """Key data, value data, key scales, value scales: [pages, slots, heads, ...], the backend's."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    impl = TritonAttentionImpl.__new__(TritonAttentionImpl)
    impl._kv_quant_mode, impl.fp8_dtype = spec.kv_quant_mode, torch.float8_e4m3fn
    key, value = (part.view(torch.uint8) for part in impl._pth_key_value_caches(cache))
    data = HEAD_SIZE // 2 if "INT4" in spec.kv_quant_mode.name else HEAD_SIZE
    assert key.shape[-1] == data + 4, "a scale of four bytes follows the data"
    return [key[..., :data], value[..., :data], impl._k_scale_cache, impl._v_scale_cache]


def fill(views: list[torch.Tensor], seed: int) -> None:
    """Every entry another one, written the way the backend's kernel addresses them."""
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        if view.dtype == torch.uint8:
            view.copy_(torch.randint(256, view.shape, generator=generator))
        else:
            view.copy_(torch.rand(view.shape, generator=generator) + 0.5)


def held(views: list[torch.Tensor], table: torch.Tensor, row: int) -> list[list[bytes]]:
    """A sequence's entries [head][slot], as the bytes of data and scales that belong together."""
    parts = []
    for view in views:
        entry = view[table[row].long()].flatten(0, 1)  # [slots, heads, ...]
        entry = entry[..., None] if entry.dim() == 2 else entry
        parts.append(entry.contiguous().view(torch.uint8))
    joined = torch.cat(parts, -1).transpose(0, 1)
    return [[bytes(slot.tolist()) for slot in head] for head in joined]


def compactor_of(policy: Any, caches: list[torch.Tensor], cache_dtype: str) -> Compactor:
    layers = {
        name: SimpleNamespace(
            kv_cache=cache,
            kv_cache_dtype=cache_dtype,
            head_size=HEAD_SIZE,
            num_heads=KV_HEADS,
            dtype=torch.float32,
            impl=SimpleNamespace(scale=0.5),
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )
        for name, cache in zip(LAYERS, caches, strict=True)
    }
    runner = v1_runner()
    runner.input_batch.req_ids = ["a", "b"]
    runner.input_batch.req_id_to_index = {"a": 0, "b": 1}
    return Compactor(runner, policy, layers)


@pytest.mark.parametrize("cache_dtype", FORMATS)
@pytest.mark.parametrize(("layout", "kernel_page_size"), CASES)
@pytest.mark.parametrize("policy", [Streaming(SINKS, RECENT), Random(SINKS, RECENT)])
def test_scales_move_with_their_data(policy, layout, kernel_page_size, cache_dtype, monkeypatch):
    spec = spec_of(cache_dtype)
    caches = make_caches(spec, layout, kernel_page_size)
    views = [backend_views(spec, cache) for cache in caches]
    for seed, view in enumerate(views):
        fill(view, seed)
    step = metadata(kernel_page_size)
    table = step.block_table_tensor
    before = [[held(view, table, row) for row in range(2)] for view in views]
    monkeypatch.setattr(layer_group, "get_tensor_model_parallel_rank", lambda: 0)
    # A CPU tensor's page would be probed for vLLM's CPU kernels.
    monkeypatch.setattr(
        layer_group, "caches_of", lambda layers: ([layer.kv_cache for layer in layers], None)
    )
    compactor = compactor_of(policy, caches, cache_dtype)
    with compactor.step(scheduler_output(dict(zip("ab", BEFORE, strict=True)))):
        compactor.begin_batch(spec.copy_with_new_block_size(kernel_page_size), LAYERS, step)
    assert compactor.num_events == 2

    for view, rows in zip(views, before, strict=True):
        for row, heads in enumerate(rows):
            start, end = EVICTED_BEFORE[row], AFTER[row]
            for entries, found in zip(heads, held(view, table, row), strict=True):
                left = found[EVICTED_AFTER[row] : end]
                assert len(set(entries[start:end])) == end - start, "every entry another one"
                assert len(set(left)) == len(left)
                assert set(left) < set(entries[start:end])
                # Positions are slots here, so only the first sequence still has its sinks.
                assert set(left) >= {*entries[start:SINKS], *entries[end - RECENT : end]}
                if isinstance(policy, Streaming):
                    newest = entries[EVICTED_AFTER[row] + SINKS : end]
                    assert left == entries[start : start + SINKS] + newest
