"""Operations on packed pages in plain torch: the ground truth for the C++ and Triton kernels."""

from __future__ import annotations

import torch

from paged_kv.kernels.operands import Queries, Segment, Terms
from paged_kv.kernels.page_layout import SCALE_BYTES, WORD, Codec, PageLayout
from paged_kv.kernels.pages import Index, region_index
from paged_kv.kernels.reference import attention_probabilities

Tensor = torch.Tensor


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Stores new entries; see ops.write."""
    kept = slots >= 0
    if not kept.any():
        return
    page, offset = slots[kept] // layout.page_size, slots[kept] % layout.page_size
    head = torch.arange(blocks.shape[1], device=blocks.device)[:, None]
    index = (page[None], head, offset[None])
    for part, numbers in (("key", keys), ("value", values)):
        codec: Codec = getattr(layout, part)
        bits = codec.encode(numbers[kept].float().transpose(0, 1))
        _put(blocks, layout, part, index, bits)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """Entries of regions; see ops.gather."""
    index = region_index(layers, pages, stack.shape[2], layout.page_size)
    codec: Codec = getattr(layout, part)
    return codec.decode(_bits(stack, layout, part, index)).flatten(-3, -2)


def take(stack: Tensor, layout: PageLayout, part: str, index: Index) -> Tensor:
    """Some entries; see ops.take."""
    codec: Codec = getattr(layout, part)
    words, halves = stack.view(torch.int32), stack.view(torch.int16)
    if part == "key":
        data = words[..., : layout.value_offset // WORD]
        data = data.unflatten(-1, (-1, layout.page_size)).transpose(-1, -2)
        first = layout.key_scale_offset
    else:
        data = words[..., layout.value_offset // WORD : layout.key_scale_offset // WORD]
        data = data.unflatten(-1, (layout.page_size, -1))
        first = layout.value_scale_offset
    bits = data[index].view(torch.uint8)
    if codec.num_scales:
        first //= SCALE_BYTES
        scales = halves[..., first : first + codec.num_scales * layout.page_size]
        scales = scales.unflatten(-1, (-1, layout.page_size)).transpose(-1, -2)
        bits = torch.cat([bits, scales[index].view(torch.uint8)], -1)
    return codec.decode(bits)


def store(stack: Tensor, layout: PageLayout, part: str, index: Index, numbers: Tensor) -> None:
    """Stores entries that a merge has made; see ops.store."""
    codec: Codec = getattr(layout, part)
    _put(stack, layout, part, index, codec.encode(numbers))


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """Copies entries between slots; see ops.move."""
    _put(stack, layout, part, target, _bits(stack, layout, part, source))


def attend(output: Tensor, queries: Queries, segments: list[Segment], terms: Terms) -> None:
    """Attention of new tokens to what their rows hold; see ops.attend."""
    starts = queries.starts.tolist()
    for row in range(len(starts) - 1):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start == tokens.stop:
            continue
        keys, values = (_entries(part, row, segments) for part in ("key", "value"))
        output[tokens] = _attend_row(queries.states[tokens], keys, values, row, segments, terms)


def _attend_row(
    states: Tensor, keys: Tensor, values: Tensor, row: int, segments: list[Segment], terms: Terms
) -> Tensor:
    """[tokens, heads, size], of states [tokens, heads, head_dim] and [kv_heads, m, size]."""
    num_tokens = len(states)
    num_kv_heads, size = keys.shape[:2]
    place = torch.arange(size, device=keys.device)
    grouped = states.float().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    sinks = None if terms.sinks is None else terms.sinks.float().view(num_kv_heads, -1)
    weights = _side(terms.weights, row, segments[0], size)
    probabilities = attention_probabilities(
        grouped,
        keys,
        torch.arange(size - num_tokens, size, device=keys.device),
        place,
        terms.scale,
        terms.softcap,
        sinks,
        None if weights is None else weights.log()[:, None, None],
    )
    if terms.scores is not None:
        page, offset = _places(row, segments[0], size)
        terms.scores[page, :, offset] += probabilities.sum((1, 2)).T
    mixed = probabilities @ values[:, None]
    return mixed.flatten(0, 1).transpose(0, 1).to(states.dtype)


def _entries(part: str, row: int, segments: list[Segment]) -> Tensor:
    """float32 [kv_heads, m, size]: a row's keys or values, segment after segment."""
    parts = []
    for segment in segments:
        count = int(segment.counts[row])
        page_size = segment.layout.page_size
        pages = segment.table[row, : -(-count // page_size)].long()
        layer = torch.zeros(1, dtype=torch.int64, device=pages.device)
        found = gather(segment.blocks[None], segment.layout, part, layer, pages[None])
        parts.append(found[0, 0, :, :count])
    return torch.cat(parts, 1)


def _places(row: int, first: Segment, size: int) -> tuple[Tensor, Tensor]:
    """(page ids, offsets) of a row's slots, int64 [size]; the first segment has all pages."""
    slot = torch.arange(size, device=first.table.device)
    page_size = first.layout.page_size
    return first.table[row, slot // page_size].long(), slot % page_size


def _side(side: Tensor | None, row: int, first: Segment, size: int) -> Tensor | None:
    if side is None:
        return None
    page, offset = _places(row, first, size)
    return side[page, :, offset].T


def _columns(layout: PageLayout, part: str) -> Tensor:
    cut = layout.key.num_bytes
    return layout.elements[:, :cut] if part == "key" else layout.elements[:, cut:]


def _bits(stack: Tensor, layout: PageLayout, part: str, index: tuple[Tensor, ...]) -> Tensor:
    *places, offset = index
    column = _columns(layout, part).to(offset.device)[offset]
    return stack[(*(place[..., None] for place in places), column)]


def _put(
    stack: Tensor, layout: PageLayout, part: str, index: tuple[Tensor, ...], bits: Tensor
) -> None:
    *places, offset = index
    column = _columns(layout, part).to(offset.device)[offset]
    stack[(*(place[..., None] for place in places), column)] = bits
