"""Where an entry's numbers lie in a page: all that compaction needs to know of a backend.

GPU backends use the logical view [pages, heads, page_size, content]: entry = view[page, :, offset].
vLLM's CPU kernels permute the elements inside a page (K transposed for "vec", tiled for "amx"), in
ways that differ by instruction set, dtype and page size. So the CPU layout is not assumed but
probed, by writing through the kernel and looking where the numbers went.
"""

from __future__ import annotations

from typing import Any

import torch


def stack_layers(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views [layers, ...] of equal, evenly spaced caches; as many as it takes.

    One index operation on a stack serves all of its layers.
    """
    first = caches[0]
    if len(caches) > 1:
        step = caches[1].storage_offset() - first.storage_offset()
        regular = step > 0 and all(
            cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and cache.storage_offset() == first.storage_offset() + index * step
            and (cache.shape, cache.stride()) == (first.shape, first.stride())
            for index, cache in enumerate(caches)
        )
        if not regular:
            return [cache.unsqueeze(0) for cache in caches]
        shape, stride = (len(caches), *first.shape), (step, *first.stride())
        return [first.as_strided(shape, stride, first.storage_offset())]
    return [first.unsqueeze(0)]


def probe_elements(layer: Any, cache: torch.Tensor) -> torch.Tensor:
    """Which elements of a CPU page belong to the entry at each offset.

    Args:
        layer: the vLLM Attention layer, whose backend writes the cache.
        cache: its cache, [pages, heads, page_size, content]; only shape and dtype are used.

    Returns:
        int64 [page_size, content].

    Raises:
        RuntimeError: entries share elements; the backend's pages cannot be compacted.
    """
    page_size, content = cache.shape[2:]
    scratch = torch.zeros((1, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    labels = torch.arange(page_size * content).view(page_size, content)  # K first, then V
    permutation = torch.zeros(page_size * content, dtype=torch.int64)
    for bit in range((page_size * content - 1).bit_length()):
        # One bit of every label at a time: 0 and 1 survive any dtype.
        _write(layer, ((labels >> bit) & 1).to(layer.dtype), scratch)
        permutation |= (scratch[0, 0].flatten().float() != 0).long() << bit
    if not torch.equal(permutation.sort().values, torch.arange(page_size * content)):
        raise RuntimeError(
            f"cannot compact pages of {type(layer.impl).__name__}: page_size {page_size}, "
            f"{cache.dtype}"
        )
    return permutation.argsort().view(page_size, content)


def _write(layer: Any, values: torch.Tensor, scratch: torch.Tensor) -> None:
    """Writes [page_size, K content | V content] into page 0, the same for every head."""
    num_heads, page_size = scratch.shape[1:3]
    per_head = values[:, None, :].expand(page_size, num_heads, values.shape[1])
    key = per_head[..., : layer.head_size].contiguous()
    value = per_head[..., layer.head_size :].contiguous()
    layer.impl.do_kv_cache_update(layer, key, value, scratch, torch.arange(page_size))
