"""Calls of the GPU's kernels, and steps of residual rings, on a device that computes nothing.

Launches are left out; what surrounds them (sizes, scratch memory, copies) runs as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import kernel_cases
import numpy as np
import torch
from kernel_cases import Case, Problem, Row
from triton.runtime.jit import JITFunction

from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels import ops, triton
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.store.residual_ring import ResidualRing

Tensor = torch.Tensor
MULTIPROCESSORS = 132  # of a GPU
DECODE = (Row(1, 33, 17), Row(1, 16, 16), Row(0, 0))
CHUNKS = (Row(5, 40, 3), Row(1, 20, 0))
KV_HEADS, PAGE_SIZE, SIZE = 2, 16, 64

launched: set[str] = set()  # names of kernels


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels are Triton's on every device, and none is launched: see `launched`."""

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        launched.add(kernel.fn.__name__)

    attending = import_module("paged_kv.kernels.triton.attend")  # a function has its name, too
    replaced = [
        (ops, "_kernels", lambda device: triton),
        (JITFunction, "run", launch),
        (attending, "_multiprocessors", lambda device: MULTIPROCESSORS),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, new in replaced:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


class Call(NamedTuple):
    """One to watch."""

    name: str
    options: str
    run: Callable[[], None]


def calls(device: torch.device) -> Iterator[Call]:
    """Every operation in every format, with all that an attention can have beside."""
    for page_format in FORMATS:
        plain = {"page_format": page_format, "key_size": SIZE, "value_size": SIZE}
        for rows in DECODE, CHUNKS:
            for dtype in torch.float32, torch.bfloat16:
                case = Case(rows, dtype=dtype, weights=True, scores=True, sinks=True, **plain)
                case = case._replace(decay=0.9, softcap=2.0)
                problem = kernel_cases.make(case)  # while tensors still have values
                output = kernel_cases.poisoned_output(problem)
                run = partial(_attend, problem, output, device)
                yield Call("attend", str(case), run)
        case = Case(**plain)
        yield Call("copies", page_format, partial(_copies, case, device))
    yield Call("attention_mass", "", partial(_mass, device))
    yield Call("residual ring", "", partial(_ring, device))


def _there(tensor: Tensor | None, device: torch.device) -> Any:
    return None if tensor is None else torch.empty_like(tensor, device=device)


def _attend(problem: Problem, output: Tensor, device: torch.device) -> None:
    there = partial(_there, device=device)
    side, terms = problem.side, problem.terms
    segments = [
        Segment(there(part.blocks), part.layout, there(part.table), there(part.counts))
        for part in problem.segments
    ]
    ops.attend(
        there(output),
        Queries(*map(there, problem.queries)),
        segments,
        terms._replace(sinks=there(terms.sinks)),
        Side(there(side.weights), there(side.scores), side.decay),
    )


def _copies(case: Case, device: torch.device) -> None:
    layout = case.layout
    stack = torch.empty((2, 6, KV_HEADS, layout.block_bytes), dtype=torch.uint8, device=device)
    new = torch.empty((7, KV_HEADS, SIZE), device=device)
    ops.write(stack[0], layout, new, new, torch.empty(7, dtype=torch.int64, device=device))

    def index() -> Any:
        places = torch.empty((4, 3), dtype=torch.int64, device=device)
        return tuple(places)

    source, target = index(), index()
    layers = torch.empty(2, dtype=torch.int64, device=device)
    pages = torch.empty((2, 3), dtype=torch.int64, device=device)
    for part in "key", "value":
        ops.move(stack, layout, part, source, target)
        ops.store(stack, layout, part, target, torch.empty((3, SIZE), device=device))
        ops.take(stack, layout, part, source)
        ops.gather(stack, layout, part, layers, pages)


def _mass(device: torch.device) -> None:
    queries = torch.empty((2, 3, KV_HEADS, 3, 9, SIZE), device=device)
    keys = torch.empty((2, 3, KV_HEADS, 70, SIZE), device=device)
    asked = torch.empty((3, 1, 1, 9), dtype=torch.int64, device=device)
    held = torch.empty((2, 3, KV_HEADS, 70), dtype=torch.int64, device=device)
    for largest in False, True:
        ops.attention_mass(DenseAttention(queries, keys, asked, held, Terms(0.125)), largest)


def _ring(device: torch.device) -> None:
    """A prompt, then a token: what is written, and what attention and a policy read."""
    layout = Case(dtype=torch.bfloat16, key_size=SIZE, value_size=SIZE).layout
    ring = ResidualRing(2, 2, PAGE_SIZE)
    ring.add_rows(3)
    ring.bind_pages(layout, KV_HEADS, device)
    rows, known = np.array([0, 2]), np.array([0, 16])
    for counts, ends in ((np.array([30, 9]), np.array([30, 40])), (np.ones(2, int), [31, 41])):
        newest = ring.plan(rows, counts, np.array(ends), known, device)
        new = torch.empty((int(counts.sum()), KV_HEADS, SIZE), dtype=torch.bfloat16, device=device)
        ring.write(1, new, new, newest)
        ring.segment(1, newest)
        ring.entries(1, "key", newest)
    ring.select_rows(np.array([2, 0, 1]))
