"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference.

Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1: Triton reads it once, when
it is imported. benchmarks/gpu/kernels_right.py runs the same cases on a GPU; see on_device.
"""

from __future__ import annotations

import itertools
from importlib import import_module

import fading
import kernel_cases
import on_device
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_cases import SPECIAL, Case, Row

import paged_kv.kernels.triton
from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels import packed_reference, reference
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import make_layout

attending = import_module("paged_kv.kernels.triton.attend")  # a function has its name, too
kernels = on_device.chosen(paged_kv.kernels.triton)
HALF, SINGLE = torch.bfloat16, torch.float32
EDGES = (Row(1, 1), Row(1, 15), Row(0, 0), Row(1, 16), Row(0, 9), Row(1, 17), Row(1, 130))
CHUNKS = (Row(7, 7), Row(1, 33), Row(0, 5), Row(20, 50))
RESIDUAL = (Row(1, 33, 17), Row(1, 16, 16), Row(0, 0), Row(5, 40, 3), Row(1, 20, 0))


def check(case: Case) -> None:
    problem = kernel_cases.make(case)
    wanted, scores = kernel_cases.expected(problem)
    output = kernel_cases.poisoned_output(problem)
    kernels.attend(output, *problem[:4])
    kernel_cases.assert_close(output, wanted)
    if scores is not None:
        # A GPU multiplies 16-bit queries with decoded keys in TF32, the interpreter in float32.
        # What is kept of their probabilities are 16-bit numbers everywhere.
        dtype = case.dtype if on_device.DEVICE == "cuda" else torch.float16
        kernel_cases.assert_close(
            problem.side.scores, scores, None if case.dtype == SINGLE else dtype
        )


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize(
    "case",
    [
        Case(EDGES, dtype=SINGLE, key_size=64, value_size=64, weights=True, scores=True),
        Case(EDGES[-2:], dtype=HALF, key_size=128, value_size=80, kv_heads=1, group=8, sinks=True),
        Case(EDGES, dtype=HALF, key_size=80, value_size=64, group=5, page_size=48, scores=True),
        Case(CHUNKS, dtype=HALF, key_size=80, value_size=16, page_size=48, softcap=2.5),
        Case(RESIDUAL, dtype=SINGLE, key_size=64, value_size=64, scores=True, decay=0.9),
    ],
    ids=["decode", "many heads", "half", "chunks", "residual"],
)
def test_attention(case, page_format):
    check(case._replace(page_format=page_format, seed=int(torch.randint(2**31, ()))))


@pytest.mark.parametrize("row", [Row(1, 20), Row(12, 33), Row(12, 12), Row(8, 30, 20)])
def test_scores_fade(row):
    """Several tokens are more than a step of the kernel takes."""
    case = Case((row, *CHUNKS), decay=0.9, kv_heads=1, **fading.LOADED)
    fading.check_definition(kernels, case)
    fading.check_chunks(kernels, case._replace(rows=(row,)), sizes=(1, 7))


DECODE = (Row(1, 300, 20), Row(0, 0), Row(1, 40, 40), Row(1, 20, 0))


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_kept_probabilities_are_those_of_a_second_reading(decay, monkeypatch):
    """Of two segments; rows are longer than what a program adds at once."""
    case = Case(DECODE, "int4", kv_heads=1, decay=decay, **fading.LOADED)
    check(case)
    fading.check_definition(kernels, case._replace(rows=DECODE[:1]))
    monkeypatch.setattr(attending, "MOST_KEPT", 0)
    check(case)


def test_cases_meet_every_way():
    """Several splits, whose sums are combined; probabilities that are kept, and that are not."""
    found = {}
    for name, rows in {"decode": EDGES[-1:], "chunks": CHUNKS}.items():
        problem = kernel_cases.make(Case(rows, scores=True))
        output = kernel_cases.poisoned_output(problem)
        call = attending._Call(output, *problem[:3], problem.side.weights)
        found[name] = call.splits[0] > 1, attending._kept(call, problem.segments[0]) is not None
    assert found["decode"] == (True, True)
    assert not found["chunks"][1]


SMALL = kernel_cases.cases(max_rows=3, max_entries=70, max_tokens=5, page_sizes=(16, 32, 48))
PACE = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=5, **PACE)
@given(SMALL)
def test_any_attention(case):
    check(case)


@pytest.mark.exhaustive
@settings(max_examples=200, **PACE)
@given(SMALL)
def test_many_attentions(case):
    check(case)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_other_rows_do_not_see_nan(odd):
    case = Case((Row(1, 20), Row(1, 20), Row(1, 33)), "int8", seed=3)
    problem = kernel_cases.make(case)
    wanted, _ = kernel_cases.expected(problem)
    first = problem.segments[0]
    slot = int(first.table[1, 0]) * case.page_size + 4
    spoilt = torch.full((1, case.kv_heads, case.key_size), odd)
    kernels.write(first.blocks, first.layout, spoilt, spoilt, torch.tensor([slot]))
    output = kernel_cases.poisoned_output(problem)
    kernels.attend(output, *problem[:4])
    assert output[1].isnan().all()
    kernel_cases.assert_close(output[::2], wanted[::2])


def ties(size: int) -> torch.Tensor:
    """float32 [8, size]: scales and numbers half-way between two that can be stored."""
    numbers = torch.arange(8.0 * size).view(8, size) % 57
    numbers[:, 0] = 448
    numbers[0, 0], numbers[1, 0] = 448 * (1 + 2**-8), 127 * (1 + 2**-8)
    return numbers


def two(layout: PageLayout, pages: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Two stacks of equal poisoned blocks, 2 layers of 2 heads."""
    blocks = kernel_cases.poisoned_blocks(2 * pages, 2, layout).clone()
    stack = blocks.unflatten(0, (2, pages))
    return stack, stack.clone()


LAYOUTS = list(itertools.product(FORMATS, (64, 80, 128)))


@pytest.mark.parametrize(("page_format", "size"), LAYOUTS)
def test_written_bytes_are_the_codecs(page_format, size):
    """Every odd entry, in slots of several pages; one token is left out."""
    for dtype in (SINGLE, HALF):
        # Where a CPU converts to bfloat16 in one instruction, torch loses what is not normal.
        odd = {name: make for name, make in SPECIAL.items() if dtype == SINGLE or name != "tiny"}
        keys = torch.cat([*(make(size) for make in odd.values()), ties(size)])
        keys = torch.stack([keys, keys.flip(0)], 1)
        values = keys.flip(1, 2) / 3
        slots = torch.randperm(6 * 16)[: len(keys)]
        slots[5] = -1
        layout = make_layout(page_format, dtype, size, size, 16)
        ours, theirs = two(layout)
        # Not contiguous, as the slices of a fused projection are.
        mixed = torch.cat([keys, values], 2).to(dtype)
        numbers = mixed[..., :size], mixed[..., size:]
        kernels.write(ours[1], layout, *numbers, slots)
        packed_reference.write(theirs[1], layout, *numbers, slots)
        kernel_cases.assert_same_entries(layout, ours, theirs)


@pytest.mark.parametrize(("page_format", "size"), LAYOUTS)
def test_store_move_gather(page_format, size):
    layout = make_layout(page_format, SINGLE, size, size, 32)
    ours, theirs = two(layout)
    layer, head = torch.arange(2)[:, None, None], torch.arange(2)[:, None]
    source = layer, torch.tensor([3, 0, 0]), head, torch.tensor([31, 0, 7])
    target = layer, torch.tensor([5, 1, 3]), head, torch.tensor([0, 9, 30])
    for part in ("key", "value"):
        numbers = torch.randn(2, 2, 3, size)
        for module, stack in ((kernels, ours), (packed_reference, theirs)):
            module.store(stack, layout, part, source, numbers)
            module.move(stack, layout, part, source, target)
        assert torch.equal(ours, theirs)
        regions = torch.tensor([1, 0]), torch.tensor([[3, 0], [5, 1]])
        found = kernels.gather(ours, layout, part, *regions)
        wanted = packed_reference.gather(theirs, layout, part, *regions)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_entries_of_one_block():
    """Their page is one number, expanded; so are numbers that are stored everywhere."""
    layout = make_layout("native", SINGLE, 16, 16, 32)
    ours, theirs = two(layout)
    zero, slots = torch.tensor([0]), torch.arange(10)
    source, target = (zero, zero, zero, slots), (zero, zero + 3, zero, slots + 20)
    numbers = torch.randn(16).expand(10, 16)
    for module, stack in ((kernels, ours), (packed_reference, theirs)):
        module.store(stack, layout, "key", source, numbers)
        module.move(stack, layout, "key", source, target)
    assert torch.equal(ours, theirs)


def test_observed_queries_are_a_slice():
    queries = torch.randn(2, 2, 1, 9, 16)[..., 2:, :]  # of one query head for each KV head
    keys, place = torch.randn(2, 2, 20, 16), torch.arange(20)
    attention = DenseAttention(queries, keys, place[13:], place, Terms(0.25))
    found, wanted = kernels.attention_mass(attention), reference.attention_mass(attention)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("size", [64, 80])
def test_observe(size, softcap):
    """Queries that are not there, that see nothing, and entries that nobody sees."""
    layers, rows, heads, group, window, entries = 2, 2, 2, 3, 7, 70
    queries = torch.randn(layers, rows, heads, group, window, size)
    keys = torch.randn(layers, rows, heads, entries, size)
    asked = torch.randint(0, 60, (rows, 1, 1, window))
    asked[0, ..., 0] = -1
    held = torch.randint(1, 65, (layers, rows, heads, entries))
    sinks = torch.randn(layers, 1, heads, group)
    for extra in (None, sinks):
        terms = Terms(size**-0.5, softcap, extra)
        attention = DenseAttention(queries, keys, asked, held, terms)
        for largest in (False, True):
            found = kernels.attention_mass(attention, largest)
            wanted = reference.attention_mass(attention, largest)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
