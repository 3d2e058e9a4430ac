"""The CPU kernels over packed pages against vLLM's own attention kernel over its bfloat16 pages.

decode   one new token per sequence; the model's heads at 8 sequences, then 32 query heads over 8 KV
         heads of 128 at 4 sequences with half of the entries
scores   the same, and what each entry gets is added to its score
prefill  512 new tokens of one sequence
write    one new token per sequence is stored (vLLM's peer: reshape_and_cache)

Both have pages of 32 that lie anywhere, and bfloat16 queries. All of one size take turns; ms are
medians over rounds, ratio is vLLM's by ours. gb_per_s is what a case must read (write: what it
writes) by its time, read_gb_per_s what a loop that only reads reached meanwhile.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoConfig
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from paged_kv.bench import script
from paged_kv.bench.attention_size import DTYPE, PAGE_SIZE, Size
from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels import cpu, ops
from paged_kv.kernels.operands import Queries, Segment, Side, Terms
from paged_kv.quant import make_layout

CHUNK = 512  # new tokens of a prefill
READ_BYTES = 1 << 28


class Run(NamedTuple):
    """Something to time, and the bytes of keys and values that it needs."""

    call: Callable[[], object]
    num_bytes: int


def ours(size: Size, page_format: str, tokens: int, scores: bool) -> tuple[Run, Run]:
    """(attention, write)."""
    layout = make_layout(page_format, DTYPE, size.head_dim, size.head_dim, PAGE_SIZE)
    num_pages = size.sequences * size.pages
    blocks = torch.zeros(num_pages, size.kv_heads, layout.block_bytes, dtype=torch.uint8)
    slots = torch.arange(num_pages * PAGE_SIZE)
    keys, values = size.entries_of(len(slots)), size.entries_of(len(slots))
    ops.write(blocks, layout, keys, values, slots)
    states, starts = size.queries(tokens), size.starts(tokens)
    output = torch.empty_like(states)
    side = Side(scores=torch.zeros(num_pages, size.kv_heads, PAGE_SIZE) if scores else None)
    segments = [Segment(blocks, layout, size.table(), size.counts())]
    operands = output, Queries(states, starts), segments, Terms(size.head_dim**-0.5), side
    newest = slots[:: size.pages * PAGE_SIZE].contiguous()
    new = keys[: len(newest)], values[: len(newest)], newest
    per_entry = size.kv_heads * layout.entry_bytes
    return (
        Run(lambda: ops.attend(*operands), size.sequences * size.entries * per_entry),
        Run(lambda: ops.write(blocks, layout, *new), len(newest) * per_entry),
    )


def vllms(size: Size, tokens: int) -> tuple[Run, Run]:
    """(attention, write) as vllm/v1/attention/backends/cpu_attn.py calls them."""
    num_pages = size.sequences * size.pages
    cache = torch.zeros(num_pages, size.kv_heads, 2 * PAGE_SIZE, size.head_dim, dtype=DTYPE)
    stored = cache.chunk(2, dim=2)
    # What a process must ask for before it may use tiles; vLLM's workers do.
    isa = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
    slots = torch.arange(num_pages * PAGE_SIZE)
    keys, values = size.entries_of(len(slots)), size.entries_of(len(slots))
    vllm_ops.cpu_attn_reshape_and_cache(keys, values, *stored, slots, isa)
    states, starts = size.queries(tokens), size.starts(tokens)
    output = torch.empty_like(states)
    counts = size.counts()
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        size.sequences, size.heads, size.kv_heads, size.head_dim, counts, DTYPE, starts,
        causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    operands = states, *stored, output, starts, counts, size.head_dim**-0.5
    rest = {"causal": True, "alibi_slopes": None, "sliding_window": -1, "softcap": 0.0}
    rest |= {"block_table": size.table(), "scheduler_metadata": plan, "s_aux": None}
    newest = slots[:: size.pages * PAGE_SIZE].contiguous()
    new = keys[: len(newest)], values[: len(newest)], *stored, newest, isa
    return (
        Run(lambda: vllm_ops.cpu_attention_with_kv_cache(*operands, **rest), 0),
        Run(lambda: vllm_ops.cpu_attn_reshape_and_cache(*new), 0),
    )


def reading() -> Run:
    """A loop that reads memory and does nothing else."""
    kernels = cpu.kernels()
    if kernels is None:
        raise ValueError("paged_kv has no compiled kernels here: nothing to measure")
    function = kernels.library.paged_kv_read
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    return Run(lambda: function(memory.data_ptr(), READ_BYTES), READ_BYTES)


def sizes(args: argparse.Namespace) -> list[Size]:
    """The model's heads, and a larger model's."""
    text = AutoConfig.from_pretrained(args.model).get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    own = Size(8, args.entries, heads, text.num_key_value_heads, head_dim)
    return [own, Size(4, max(1, args.entries // 2), 32, 8, 128)]


def measure(runs: dict[Any, Run], rounds: int) -> dict[Any, float]:
    """Median milliseconds of each; they take turns."""
    found: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run.call()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(times[1:]) for name, times in found.items()}  # the first one warms up


def compare(args: argparse.Namespace, size: Size, prefill: bool) -> list[dict[str, Any]]:
    """Lines of all cases of one size."""
    tokens = min(CHUNK, size.entries) if prefill else 1
    read, peer = reading(), dict(zip(("attend", "write"), vllms(size, tokens), strict=True))
    cases: dict[tuple[str, str], Run] = {}
    for page_format in FORMATS:
        attend, write = ours(size, page_format, tokens, scores=False)
        cases["prefill" if prefill else "decode", page_format] = attend
        if not prefill:
            cases["scores", page_format] = ours(size, page_format, tokens, scores=True)[0]
            cases["write", page_format] = write
    times = measure({"read": read, **peer, **cases}, args.rounds)
    lines = []
    for (op, page_format), run in cases.items():
        own, theirs = times[op, page_format], times["write" if op == "write" else "attend"]
        lines.append(
            {"case": op, "op": op, "format": page_format, **size._asdict(), "tokens": tokens}
            | {"ours_ms": round(own, 4), "vllm_ms": round(theirs, 4)}
            | {"ratio": round(theirs / own, 3), "gb_per_s": round(run.num_bytes / own / 1e6, 2)}
            | {"read_gb_per_s": round(read.num_bytes / times["read"] / 1e6, 2)}
        )
    return lines


def main(args: argparse.Namespace) -> None:
    current_platform.import_kernels()
    torch.manual_seed(args.seed)
    cases = [(size, False) for size in sizes(args)]
    cases += [(size._replace(sequences=1), True) for size in sizes(args)]
    for size, prefill in tqdm(cases, unit="size"):
        for line in compare(args, size, prefill):
            if args.json:
                script.emit("kernels", args, line)
            else:
                print(*(f"{value:>10}" for value in list(line.values())[1:]))


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=15)
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    parser.add_argument("--entries", type=script.positive, default=8192, metavar="N",
                        help="entries of a sequence (default 8192)")  # fmt: skip
    raise SystemExit(script.run(main, parser))
