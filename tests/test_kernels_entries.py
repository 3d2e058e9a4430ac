"""Writing, reading, moving and scoring entries: every build of the C++ kernels by the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_builds import BUILDS, kernels_of
from kernel_cases import (
    DTYPES,
    HEAD_SIZES,
    PAGE_SIZES,
    SPECIAL,
    assert_same_entries,
    normal,
    poisoned_blocks,
)

from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels import packed_reference, reference
from paged_kv.kernels.index import NOWHERE
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.quant import make_layout

HEADS, PAGES = 2, 4


def entries(layout, dtype, count, seed):
    """Keys, values and distinct slots of some tokens, one in four to be left out."""
    generator = torch.Generator().manual_seed(seed)
    keys = normal(generator, count, HEADS, layout.key.size).to(dtype)
    values = normal(generator, count, HEADS, layout.value.size).to(dtype)
    slots = torch.randperm(PAGES * layout.page_size, generator=generator)[:count]
    slots[torch.rand(count, generator=generator) < 0.25] = -1
    return keys, values, slots


def same_writes(build, layout, keys, values, slots):
    """The blocks that both make; the rest of a block stays as it was."""
    blocks = [poisoned_blocks(PAGES, HEADS, layout) for _ in range(2)]
    packed_reference.write(blocks[0], layout, keys, values, slots)
    kernels_of(build).write(blocks[1], layout, keys, values, slots)
    assert_same_entries(layout, blocks[1], blocks[0])
    return blocks[1]


@pytest.mark.parametrize("build", BUILDS)
@given(
    page_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    native=st.sampled_from(DTYPES),
    sizes=st.tuples(st.sampled_from(HEAD_SIZES), st.sampled_from(HEAD_SIZES)),
    page_size=st.sampled_from(PAGE_SIZES),
    count=st.integers(0, 60),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_what_is_written_and_read(build, page_format, dtype, native, sizes, page_size, count, seed):
    """Bytes as the codecs make them, numbers as they read them, whatever was written."""
    layout = make_layout(page_format, native, *sizes, page_size)
    blocks = same_writes(build, layout, *entries(layout, dtype, count, seed))
    stack = torch.stack([torch.zeros_like(blocks), blocks])
    layers, pages = torch.tensor([1, 0, 1]), torch.tensor([[3, 0], [1, 1]])
    for part in ("key", "value"):
        wanted = packed_reference.gather(stack, layout, part, layers, pages)
        found = kernels_of(build).gather(stack, layout, part, layers, pages)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_entries(build, page_format, name):
    """Zeros, extremes, NaN and infinities, in the first of two heads: the other is not touched."""
    torch.manual_seed(5)
    for size in (16, 64, 80):
        layout = make_layout(page_format, torch.float32, size, size, 16)
        numbers = torch.randn(8, HEADS, size)
        numbers[:, 0] = SPECIAL[name](size)
        slots = torch.randperm(PAGES * 16)[:8]
        blocks = same_writes(build, layout, numbers, numbers.flip(0), slots)
        found = kernels_of(build).gather(
            blocks[None], layout, "key", torch.tensor([0]), torch.arange(PAGES)[None]
        )[0, 0]
        stored = found[:, slots].transpose(0, 1)
        assert stored[:, 1].isfinite().all()
        assert torch.equal(
            stored[:, 0].isnan().any(-1) | stored[:, 0].isinf().any(-1),
            ~layout.key.decode(layout.key.encode(numbers[:, 0])).isfinite().all(-1),
        )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_entries_keep_their_bytes(build, page_format, dtype):
    """Of one part, in several layers and heads, some onto themselves; nothing else changes."""
    layout = make_layout(page_format, dtype, 64, 80, 16)
    keys, values, _ = entries(layout, dtype, PAGES * 16, 11)
    slots = torch.arange(PAGES * 16)
    stack = torch.stack([poisoned_blocks(PAGES, HEADS, layout) for _ in range(3)])
    for layer in range(3):
        packed_reference.write(stack[layer], layout, keys, values, slots.roll(layer))
    layers, heads = torch.tensor([2, 0])[:, None, None], torch.arange(HEADS)[:, None]
    source = layers, torch.tensor([3, 1, 0]), heads, torch.tensor([15, 0, 4])
    target = layers, torch.tensor([0, 2, 0]), heads, torch.tensor([7, 7, 4])
    for part in ("key", "value"):
        wanted, found = stack.clone(), stack.clone()
        packed_reference.move(wanted, layout, part, source, target)
        kernels_of(build).move(found, layout, part, source, target)
        assert not torch.equal(wanted, stack)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
def test_stored_numbers(build, page_format):
    """store encodes as write does: bytes that were read and stored again stay, but for int8, fp8
    and int4 only their numbers do, to half a step (the largest number's rounding moves the
    scale)."""
    layout = make_layout(page_format, torch.bfloat16, 64, 64, 32)
    numbers = normal(torch.Generator().manual_seed(2), HEADS, 70, 64)
    slot = torch.arange(70)
    index = torch.zeros((), dtype=torch.int64), slot // 32, torch.arange(HEADS)[:, None], slot % 32
    blocks = [poisoned_blocks(PAGES, HEADS, layout)[None] for _ in range(2)]
    for part in ("key", "value"):
        packed_reference.store(blocks[0], layout, part, index, numbers)
        kernels_of(build).store(blocks[1], layout, part, index, numbers)
    assert_same_entries(layout, blocks[1][0], blocks[0][0])
    again = blocks[1].clone()
    read = kernels_of(build).gather(again, layout, "key", torch.tensor([0]), torch.arange(3)[None])[
        0, 0
    ]
    kernels_of(build).store(again, layout, "key", index, read[:, :70])
    if page_format == "native":
        assert torch.equal(again, blocks[1])
    twice = kernels_of(build).gather(
        again, layout, "key", torch.tensor([0]), torch.arange(3)[None]
    )[0, 0]
    step = {"native": 0, "int8": 2**-8, "int4": 1 / 15, "fp8": 2**-4}[page_format]
    largest = read[:, :70].abs().amax(-1, keepdim=True)
    assert ((twice - read)[:, :70].abs() <= 2 * step * largest).all()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("page_format", FORMATS)
def test_what_is_left_out_keeps_its_bytes(build, page_format):
    layout = make_layout(page_format, torch.float32, 64, 64, 32)
    numbers = normal(torch.Generator().manual_seed(2), HEADS, 32, 64)
    slot, zero = torch.arange(32), torch.zeros((), dtype=torch.int64)
    head, stored = torch.arange(HEADS)[:, None], slot % 3 == 0
    blocks = [poisoned_blocks(PAGES, HEADS, layout)[None] for _ in range(2)]
    for part in ("key", "value"):
        some = zero, zero, head, slot[stored]
        packed_reference.store(blocks[0], layout, part, some, numbers[:, stored])
        offset = torch.where(stored, slot, NOWHERE)
        kernels_of(build).store(blocks[1], layout, part, (zero, zero, head, offset), numbers)
    assert_same_entries(layout, blocks[1][0], blocks[0][0])
    assert torch.equal(blocks[1][0, 1:], poisoned_blocks(PAGES, HEADS, layout)[1:])


@pytest.mark.parametrize("build", BUILDS)
@given(
    window=st.integers(1, 40),
    size=st.integers(1, 300),
    head_dim=st.sampled_from(HEAD_SIZES),
    softcap=st.sampled_from([0.0, 2.0]),
    sinks=st.booleans(),
    largest=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_attention_mass(build, window, size, head_dim, softcap, sinks, largest, seed):
    """Of queries that are missing, and of padding with the largest position, too."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 2, HEADS, 3, window, head_dim, generator=generator)
    keys = torch.randn(2, 2, HEADS, size, head_dim, generator=generator)
    asked = torch.randint(-1, 400, (2, 1, 1, window), generator=generator)
    held = torch.randint(0, 400, (2, 2, HEADS, size), generator=generator)
    held[..., -1] = torch.iinfo(torch.int64).max
    extra = torch.randn(2, 1, HEADS, 3, generator=generator) if sinks else None
    terms = Terms(head_dim**-0.5, softcap, extra)
    attention = DenseAttention(queries, keys, asked, held, terms)
    wanted = reference.attention_mass(attention, largest)
    found = kernels_of(build).attention_mass(attention, largest)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
