"""The operations of protocol.Kernels in plain torch: the ground truth for C++ and Triton.

It does their work where there are none. What the operands mean is said in the protocol.
"""

from __future__ import annotations

import torch

from paged_kv.kernels import bounds
from paged_kv.kernels.index import NOWHERE, Index, region_index
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import SCALE_BYTES, WORD, Codec, PageLayout
from paged_kv.kernels.reference import attention_mass, attention_probabilities, fade

__all__ = ["attend", "attention_mass", "gather", "move", "store", "take", "write"]

Tensor = torch.Tensor


def write(blocks: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Stores new entries."""
    bounds.inside("slots: slot", slots, len(blocks) * layout.page_size, lowest=None)
    stored = slots >= 0
    if not stored.any():
        return
    page, offset = slots[stored] // layout.page_size, slots[stored] % layout.page_size
    head = torch.arange(blocks.shape[1], device=blocks.device)[:, None]
    index = (page[None], head, offset[None])
    for part, numbers in (("key", keys), ("value", values)):
        codec: Codec = getattr(layout, part)
        bits = codec.encode(numbers[stored].float().transpose(0, 1))
        _put(blocks, layout, part, index, bits)


def gather(stack: Tensor, layout: PageLayout, part: str, layers: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of whole pages."""
    bounds.inside("layers: layer", layers, len(stack))
    bounds.inside("pages: page", pages, stack.shape[1])
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
    """Stores numbers in slots."""
    codec: Codec = getattr(layout, part)
    layer, page, head, offset = torch.broadcast_tensors(*index)
    kept = offset != NOWHERE
    places = layer[kept], page[kept], head[kept], offset[kept]
    bounds.entries(stack, layout, places)
    _put(stack, layout, part, places, codec.encode(numbers[kept]))


def move(stack: Tensor, layout: PageLayout, part: str, source: Index, target: Index) -> None:
    """Copies the bytes of entries between slots."""
    bounds.entries(stack, layout, source)
    bounds.entries(stack, layout, target)
    _put(stack, layout, part, target, _bits(stack, layout, part, source))


def attend(
    output: Tensor, queries: Queries, segments: list[Segment], terms: Terms, side: Side
) -> None:
    """Attention of new tokens to all that their rows hold."""
    bounds.rows(queries, segments, side)
    starts = queries.starts.tolist()
    for row in range(len(starts) - 1):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start == tokens.stop:
            continue
        keys, values = (_entries(part, row, segments) for part in ("key", "value"))
        page, offset = _places(row, segments[0], keys.shape[1])
        weights = None if side.weights is None else side.weights[page, :, offset].T
        probabilities = _probabilities(queries.states[tokens], keys, terms, weights)
        if side.scores is not None:
            asked = torch.ones(len(probabilities[0, 0]), dtype=torch.bool, device=page.device)
            before = side.scores[page, :, offset].T
            side.scores[page, :, offset] = fade(before, probabilities, side.decay, asked).T
        mixed = probabilities @ values[:, None]
        output[tokens] = mixed.flatten(0, 1).transpose(0, 1).to(output.dtype)


def _probabilities(states: Tensor, keys: Tensor, terms: Terms, weights: Tensor | None) -> Tensor:
    """[kv_heads, group, tokens, m], of states [tokens, heads, head_dim] of the newest entries.

    Args:
        states: see Queries; of one row.
        keys: float32 [kv_heads, m, head_dim], all of the row.
        terms: see Terms.
        weights: float32 [kv_heads, m]; see Side.
    """
    num_kv_heads, size = keys.shape[:2]
    place = torch.arange(size, device=keys.device)
    if terms.sinks is not None:
        terms = terms._replace(sinks=terms.sinks.float().view(num_kv_heads, -1))
    grouped = states.float().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    attention = DenseAttention(grouped, keys, place[size - len(states) :], place, terms)
    bias = None if weights is None else weights.log()[:, None, None]
    return attention_probabilities(attention, bias)


def _entries(part: str, row: int, segments: list[Segment]) -> Tensor:
    """float32 [kv_heads, m, size]: a row's keys or values, segment after segment."""
    parts = []
    for segment in segments:
        count = int(segment.counts[row])
        page_size = segment.layout.page_size
        pages = segment.table[row, : -(-count // page_size)].long()
        layer = torch.zeros(1, dtype=torch.int64, device=pages.device)
        numbers = gather(segment.blocks[None], segment.layout, part, layer, pages[None])
        parts.append(numbers[0, 0, :, :count])
    return torch.cat(parts, 1)


def _places(row: int, first: Segment, size: int) -> tuple[Tensor, Tensor]:
    """(page ids, offsets) of a row's slots, int64 [size]; the first segment has all pages."""
    slot = torch.arange(size, device=first.table.device)
    page_size = first.layout.page_size
    return first.table[row, slot // page_size].long(), slot % page_size


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
