"""What the Triton kernels need of a GPU, from the compiler; no GPU is needed.

Every call below compiles its kernels as on that GPU, from the arguments that it would launch them
with; nothing is launched. Prints a JSON line per kernel: case, kernel, arch, registers of a thread,
spilled bytes, shared memory of a program in bytes, warps, and inexact instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import paged_kv.kernels.triton as kernels
from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels.operands import DenseAttention, Queries, Segment, Side, Terms
from paged_kv.quant import make_layout

KV_HEADS, GROUP, PAGE_SIZE, ROWS, NUM_PAGES = 3, 3, 32, 8, 64
CHUNK = 64  # new tokens of a row in the prefill case
# Instructions that round a product and a sum at once, divide roughly or lose small numbers.
INEXACT = re.compile(r"\bfma\.|\bdiv\.(?:full|approx)|\.ftz\b")


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Launches become compilations; yields the list that the compiled kernels are added to."""
    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return made[-1]

    driver.set_active(_Driver(arch))  # of one arch in a process: kernels are kept by device
    JITFunction.run = compile_only
    try:
        yield made
    finally:
        JITFunction.run = run


def attend(page_format: str, dtype: torch.dtype, size: int, tokens: int) -> None:
    layout = make_layout(page_format, dtype, size, size, PAGE_SIZE)
    blocks = torch.zeros(NUM_PAGES, KV_HEADS, layout.block_bytes, dtype=torch.uint8)
    table = torch.zeros(ROWS, NUM_PAGES, dtype=torch.int32)
    segment = Segment(blocks, layout, table, torch.zeros(ROWS, dtype=torch.int32))
    heads = KV_HEADS * GROUP
    states = torch.zeros(ROWS * tokens, heads, size, dtype=dtype)
    starts = torch.zeros(ROWS + 1, dtype=torch.int32)
    weights = torch.ones(NUM_PAGES, KV_HEADS, PAGE_SIZE)
    terms, queries = Terms(size**-0.5, 0.0, torch.zeros(heads)), Queries(states, starts)
    for decay in (1.0, 0.9):
        side = Side(weights, weights.clone(), decay)
        kernels.attend(torch.empty_like(states), queries, [segment], terms, side)


def copy(page_format: str, dtype: torch.dtype, size: int) -> None:
    layout = make_layout(page_format, dtype, size, size, PAGE_SIZE)
    stack = torch.zeros(2, NUM_PAGES, KV_HEADS, layout.block_bytes, dtype=torch.uint8)
    states = torch.zeros(ROWS, KV_HEADS, size, dtype=dtype)
    index = torch.zeros(4, 16, dtype=torch.int64)
    kernels.write(stack[0], layout, states, states, torch.zeros(ROWS, dtype=torch.int64))
    kernels.store(stack, layout, "key", tuple(index), torch.zeros(16, size))
    kernels.move(stack, layout, "key", tuple(index), tuple(index))
    kernels.gather(stack, layout, "value", index[0, :1], index[:1, :2])


def observe(size: int) -> None:
    window, entries = 32, 256
    attention = DenseAttention(
        torch.zeros(2, KV_HEADS, GROUP, window, size),
        torch.zeros(2, KV_HEADS, entries, size),
        torch.zeros(window, dtype=torch.int64),
        torch.zeros(entries, dtype=torch.int64),
        Terms(size**-0.5),
    )
    for largest in (False, True):
        kernels.attention_mass(attention, largest)


def cases(options: Any) -> Iterator[tuple[str, Any]]:
    """(name, call)."""
    for size, dtype, name in product(options.sizes, options.dtypes, options.formats):
        of = f"{name} {dtype} {size}"
        case = name, getattr(torch, dtype), size
        yield f"decode {of}", partial(attend, *case, tokens=1)
        yield f"prefill {of}", partial(attend, *case, tokens=CHUNK)
        yield f"copy {of}", partial(copy, *case)
    for size in options.sizes:
        yield f"observe {size}", partial(observe, size)


def resources(compiled: Any) -> dict[str, Any]:
    """Of the machine code that would be loaded. Registers that are spilled lie on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return {
        "kernel": compiled.metadata.name,
        "arch": compiled.metadata.arch,
        "registers": int(registers),
        "spilled": int(stack),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "inexact": len(INEXACT.findall(compiled.asm["ptx"])),
    }


def main(options: Any) -> None:
    seen = set()
    for case, call in cases(options):
        with compiling(options.arch) as made:
            call()
        for compiled in made:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                print(json.dumps({"case": case} | resources(compiled)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, choices=(80, 90), required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 80, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    main(parser.parse_args())
