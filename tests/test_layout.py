"""Moving entries in pages of any memory layout, those that vLLM's CPU kernels write included."""

from types import SimpleNamespace

import engines  # noqa: F401  sets the environment before torch and vLLM are imported
import pytest
import torch
from cpu_pages import FP8, as_numbers, cpu_layer, write_through_kernel
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.store.pages import move_entries
from paged_kv.vllm.worker.layout import probe_elements, stack_layers

LAYERS, PAGES, HEADS, PAGE_SIZE, CONTENT = SHAPE = (2, 5, 3, 4, 6)
Slots = tuple[torch.Tensor, torch.Tensor]


def random_pages(seed: int = 0) -> torch.Tensor:
    """The logical view [layers, pages, heads, page_size, content]; every number is another one."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(LAYERS * PAGES * HEADS * PAGE_SIZE * CONTENT, generator=generator)
    return numbers.view(SHAPE).float()


def slots(indices: list[int]) -> Slots:
    index = torch.tensor(indices, dtype=torch.int64)
    return index // PAGE_SIZE, index % PAGE_SIZE


def moved(pages: torch.Tensor, source: list[int], target: list[int]) -> torch.Tensor:
    """What must come out: one entry at a time, all read from the pages as they were."""
    result = pages.clone()
    for read, write in zip(source, target, strict=True):
        (from_page, from_offset), (to_page, to_offset) = (
            divmod(slot, PAGE_SIZE) for slot in (read, write)
        )
        for layer in range(LAYERS):
            for head in range(HEADS):
                entry = pages[layer, from_page, head, from_offset]
                result[layer, to_page, head, to_offset] = entry
    return result


@st.composite
def moves(draw) -> tuple[list[int], list[int]]:
    """Any sources, distinct targets; a slot can be both."""
    slot = st.integers(0, PAGES * PAGE_SIZE - 1)
    target = draw(st.lists(slot, unique=True))
    return draw(st.lists(slot, min_size=len(target), max_size=len(target))), target


# ---- logical views


@pytest.mark.parametrize(
    "order",
    [
        (0, 1, 2, 3, 4),  # heads before tokens
        (0, 1, 3, 2, 4),  # tokens before heads
        (1, 0, 2, 3, 4),  # all layers of a page together
        (1, 3, 0, 2, 4),
        (4, 3, 2, 1, 0),
    ],
    ids=str,
)
@given(moves())
def test_any_strides(order, slot_pairs):
    source, target = slot_pairs
    logical = random_pages()
    inverse = sorted(range(5), key=order.__getitem__)
    pages = logical.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)
    assert torch.equal(pages, logical)
    move_entries(pages, slots(source), slots(target))
    assert torch.equal(pages, moved(logical, source, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn])
def test_any_dtype(dtype):
    logical = (random_pages() % 128).to(torch.uint8)
    pages = logical.to(dtype)
    move_entries(pages, slots([0, 5]), slots([9, 17]))
    assert torch.equal(pages.float(), moved(logical, [0, 5], [9, 17]).to(dtype).float())


# ---- permuted pages


@given(moves(), st.randoms(use_true_random=False))
def test_scattered_elements_come_to_the_same(slot_pairs, random):
    """The logical result does not depend on where in a page an entry's elements lie."""
    source, target = slot_pairs
    places = list(range(PAGE_SIZE * CONTENT))
    random.shuffle(places)
    elements = torch.tensor(places).view(PAGE_SIZE, CONTENT)
    logical = random_pages()
    pages = torch.empty(LAYERS, PAGES, HEADS, PAGE_SIZE * CONTENT)
    pages[..., elements] = logical
    move_entries(pages, slots(source), slots(target), elements)
    assert torch.equal(pages[..., elements], moved(logical, source, target))


# ---- stacks


def check_stacks(caches: list[torch.Tensor], num_stacks: int) -> None:
    """The stacks are the caches, in order, and writing to them is writing to the caches."""
    stacks = stack_layers(caches)
    assert len(stacks) == num_stacks
    layers = [layer for stack in stacks for layer in stack]
    assert len(layers) == len(caches)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        assert torch.equal(layer, cache)
        layer.fill_(-index)
    for index, cache in enumerate(caches):
        assert (cache == -index).all()


REGULAR = {
    "one after the other": lambda: list(random_pages()),
    "interleaved": lambda: list(random_pages().transpose(0, 1).contiguous().unbind(1)),
    "every second": lambda: list(torch.rand(6, 2, 3)[::2]),
    "not from the start": lambda: list(torch.rand(6, 2, 3)[2:5]),
    "one": lambda: [torch.rand(2, 3)],
    "one inside a buffer": lambda: [torch.rand(6, 2, 3)[4]],
}
_buffer = torch.rand(8, 2, 2)
IRREGULAR = {
    "storages of their own": lambda: [torch.rand(2, 3) for _ in range(3)],
    "backwards": lambda: list(reversed(random_pages().unbind())),
    "uneven": lambda: [_buffer[0], _buffer[1], _buffer[3]],
    "out of order": lambda: [_buffer[0], _buffer[2], _buffer[1]],
    "shapes": lambda: [_buffer[0], _buffer[1, :1], _buffer[2]],
    "strides": lambda: [_buffer[0], _buffer[1].T, _buffer[2]],
    "equal offsets in two storages": lambda: [*torch.rand(2, 2, 2), torch.rand(3, 2, 2)[2]],
}


@pytest.mark.parametrize("case", REGULAR)
def test_evenly_spaced_caches_are_one_stack(case):
    check_stacks(REGULAR[case](), 1)


@pytest.mark.parametrize("case", IRREGULAR)
def test_others_are_stacks_of_one(case):
    caches = IRREGULAR[case]()
    check_stacks(caches, len(caches))


# ---- vLLM's CPU kernels


@pytest.mark.vllm_ops
@pytest.mark.parametrize("cache_dtype", ["auto", *FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_probed_elements_hold_what_the_kernel_wrote(page_size, dtype, cache_dtype):
    layer = cpu_layer(dtype, page_size, cache_dtype)
    cache = torch.zeros(5, 2, page_size, 128, dtype=layer.kv_cache_torch_dtype)
    elements = probe_elements(layer, cache)
    assert not cache.any()  # it was probed on a page of its own
    used = torch.randperm(5 * page_size)[: 3 * page_size]
    entries = write_through_kernel(layer, cache, used)
    flat = as_numbers(cache.flatten(2), cache_dtype)  # [pages, heads, page_size * content]
    found = flat[(used // page_size)[:, None], :, elements[used % page_size]]
    assert torch.equal(found.transpose(1, 2), entries.float())


@pytest.mark.vllm_ops
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_probed_elements_of_other_heads(head_size):
    layer = cpu_layer(torch.float32, 32, head_size=head_size)
    cache = torch.zeros(2, 2, 32, 2 * head_size)
    elements = probe_elements(layer, cache)
    used = torch.randperm(64)
    entries = write_through_kernel(layer, cache, used)
    found = cache.flatten(2)[(used // 32)[:, None], :, elements[used % 32]]
    assert torch.equal(found.transpose(1, 2), entries)


@pytest.mark.vllm_ops
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("page_size", [32, 128])
def test_moving_is_what_writing_there_would_have_been(page_size, cache_dtype):
    """Bit for bit, in all heads: the kernel's own pages after a move and after a rewrite."""
    layer = cpu_layer(torch.bfloat16, page_size, cache_dtype)
    pages = torch.zeros(4, 2, page_size, 128, dtype=layer.kv_cache_torch_dtype)
    used = torch.arange(4 * page_size)
    entries = write_through_kernel(layer, pages, used)
    source, target = torch.randperm(4 * page_size)[:40].split(20)
    rewritten = pages.clone()
    key, value = (half.contiguous() for half in entries[source].chunk(2, -1))
    layer.impl.do_kv_cache_update(layer, key, value, rewritten, target)
    (stack,) = stack_layers([pages.flatten(2)])
    where = [(slot // page_size, slot % page_size) for slot in (source, target)]
    move_entries(stack, *where, probe_elements(layer, pages))
    assert torch.equal(pages, rewritten)


class SharingImpl:
    """Writes the keys over the values."""

    def do_kv_cache_update(self, layer, key, value, cache, used):
        cache[0, :, used, : key.shape[-1]] = value.transpose(0, 1)


def test_a_layout_in_which_entries_share_elements_is_refused():
    layer = SimpleNamespace(impl=SharingImpl(), head_size=4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cannot compact pages of SharingImpl: page_size 16"):
        probe_elements(layer, torch.zeros(1, 2, 16, 8))
