"""Reading and writing entries of pages as numbers: logical views, CPU pages of every kind, fp8."""

from __future__ import annotations

import engines  # noqa: F401  vLLM's environment
import pytest
import torch
from cpu_pages import as_numbers, cpu_layer, write_through_kernel

from paged_kv.kernels.index import region_index, slot_index
from paged_kv.store.entries import Number
from paged_kv.store.pages import native_pages
from paged_kv.vllm.worker.layer_group import _number
from paged_kv.vllm.worker.layout import probe_elements

PAGES, HEADS = 5, 2


def index_of(used: torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """[heads, slots] of one layer."""
    head = torch.arange(HEADS)[:, None]
    return torch.zeros(1, dtype=torch.int64), used // page_size, head, used % page_size


def cpu_pages(dtype, page_size, cache_dtype, head_size=64) -> tuple:
    layer = cpu_layer(dtype, page_size, cache_dtype, head_size)
    cache = torch.zeros(PAGES, HEADS, page_size, 2 * head_size, dtype=layer.kv_cache_torch_dtype)
    layer.kv_cache = cache
    elements = probe_elements(layer, cache)
    key, value = _number(layer, "_k_scale_float"), _number(layer, "_v_scale_float")
    return layer, cache, native_pages(cache.flatten(2)[None], head_size, key, value, elements)


@pytest.mark.vllm_ops
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("page_size", [32, 128])
def test_read_what_the_kernel_wrote(page_size, cache_dtype):
    layer, cache, pages = cpu_pages(torch.bfloat16, page_size, cache_dtype)
    used = torch.randperm(PAGES * page_size)[:50]
    entries = write_through_kernel(layer, cache, used).float()  # [slots, heads, K | V]
    keys, values = entries.transpose(0, 1).chunk(2, -1)
    index = index_of(used, page_size)
    assert torch.equal(pages.keys.decode(pages.keys.read(index)), keys)
    assert torch.equal(pages.values.decode(pages.values.read(index)), values)


@pytest.mark.vllm_ops
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
def test_written_like_the_kernel_would(cache_dtype):
    layer, cache, pages = cpu_pages(torch.bfloat16, 32, cache_dtype)
    used = torch.randperm(PAGES * 32)[:50]
    entries = write_through_kernel(layer, cache, used)
    expected = cache.clone()
    cache.zero_()
    keys, values = entries.float().transpose(0, 1).chunk(2, -1)
    index = index_of(used, 32)
    pages.keys.write(index, pages.keys.encode(keys))
    pages.values.write(index, pages.values.encode(values))
    assert torch.equal(as_numbers(cache, cache_dtype), as_numbers(expected, cache_dtype))


def test_elements_in_any_order():
    """Pages that no strides describe (AMX tiles) are read and written element by element."""
    page_size, size = 4, 3
    elements = torch.randperm(page_size * 2 * size).view(page_size, 2 * size)
    stack = torch.rand(2, PAGES, HEADS, page_size * 2 * size)
    number = Number(torch.float32)
    pages = native_pages(stack, size, number, number, elements)
    assert pages.keys.elements is not None
    logical = stack[..., elements]  # [layers, pages, heads, page_size, K | V]
    ids = torch.tensor([[3, 1], [0, 4]])
    index = region_index(torch.arange(2), ids, HEADS, page_size)
    expected = logical[:, ids].transpose(2, 3)  # [layers, sequences, heads, pages, page_size, ...]
    assert torch.equal(pages.keys.read(index), expected[..., :size])
    assert torch.equal(pages.values.read(index), expected[..., size:])
    slots = torch.tensor([5, 0]).expand(2, 2, HEADS, 2)
    new = torch.rand(2, 2, HEADS, 2, size)
    pages.values.write(slot_index(torch.arange(2), ids, slots, page_size), new)
    for sequence, (first, second) in enumerate(ids.tolist()):
        logical[:, second, :, 1, size:] = new[:, sequence, :, 0]  # slot 5
        logical[:, first, :, 0, size:] = new[:, sequence, :, 1]
    assert torch.equal(stack[..., elements], logical)


def test_numbers_out_of_range():
    """A merged value that fp8 cannot hold becomes the largest one, not NaN."""
    number = Number(torch.float8_e4m3fn, scale=0.5)
    stack = torch.zeros(1, 1, 1, 2, 4, dtype=torch.uint8)
    part = native_pages(stack, 2, number, number).keys
    encoded = part.encode(torch.tensor([[1000.0, -1000.0], [3.0, 0.0]]))
    assert part.decode(encoded).tolist() == [[224.0, -224.0], [3.0, 0.0]]
