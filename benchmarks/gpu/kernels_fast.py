"""How fast the Triton kernels are: against the copy bandwidth of the same GPU, and against others.

copy         a copy within the GPU's memory: the bandwidth that all shares are of
fa3, sdpa    FlashAttention 3 over vLLM's pages (where vLLM has it), torch's SDPA over dense tensors
decode       attention of one new token per sequence, over pages of each format
scores       the same, and what each entry gets is added to its score
write, move, observe   a step's tokens and a prompt's; a compaction; the queries of a window

A line has ms (median, in a CUDA graph), bytes that must move, gb_per_s of these, and
bandwidth_share of the copy's. Inputs rotate where they would stay in the cache. Every output is
compared with the reference: what is wrong fails, what misses a wanted figure does not.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import timing
import torch
from attention_cases import Dense, FlashPaged, Ours
from copying_cases import Moving, Observing, Writing

import paged_kv.kernels.triton as kernels
from paged_kv.bench.attention_size import Size
from paged_kv.core.page_formats import FORMATS

LARGEST_ERROR = 1e-2  # bfloat16 outputs of TF32 products
SHARES = {"native": 0.75, "int8": 0.65, "int4": 0.50}  # of the copy bandwidth, at WANTED_AT
AGAINST_FA3 = {"native": 1.1, "int8": 0.65, "int4": 0.45}
WITH_SCORES = 1.15
WANTED_AT = (64, 8192)  # sequences, entries


class Run:
    """The measurements, and what later ones are compared with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        self.part = common.Part("kernels_fast", args)
        self.bandwidth: float | None = None  # GB/s
        self.ms: dict[tuple[str, Size], float] = {}

    def timed(self, make: Callable[[], Any]) -> dict[str, Any]:
        """Fields of the calls of as many cases as are needed; the first one's error is taken."""
        cases = [make()]
        error = cases[0].error() if hasattr(cases[0], "error") else None
        if error is not None and not error <= LARGEST_ERROR:
            raise ValueError(f"the result is wrong: relative error {error:.2e}")
        num_bytes = getattr(cases[0], "num_bytes", None)
        needed = 1 if num_bytes is None else timing.num_sets(num_bytes, self.device)
        cases += [make() for _ in range(1, min(needed, self.args.most_sets))]
        times = timing.measure([case.run for case in cases], self.device, self.args.rounds)
        found: dict[str, Any] = {**times.fields(), "sets": len(cases)}
        if error is not None:
            found["error"] = float(f"{error:.2e}")
        if num_bytes is not None:
            speed = num_bytes / times.ms / 1e6
            share = None if self.bandwidth is None else round(speed / self.bandwidth, 4)
            found |= {"bytes": num_bytes, "gb_per_s": round(speed, 1), "bandwidth_share": share}
        return found

    def case(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A line; its tensors are given back."""
        found = self.part.case(name, run)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return found

    def copy(self) -> None:
        def run() -> dict[str, Any]:
            times, speed = timing.copy_bandwidth(
                self.args.copy_mb << 20, self.device, self.args.rounds
            )
            self.bandwidth = speed
            return {**times.fields(), "gb_per_s": round(speed, 1)}

        self.case("copy", run)

    def peers(self, size: Size) -> None:
        """FlashAttention 3 and SDPA."""
        for name, peer in (("fa3", FlashPaged), ("sdpa", Dense)):
            if name == "fa3" and (reason := no_flash_attention(self.device)):
                self.part.line(f"fa3 {label(size)}", None, skipped=reason)
                continue
            found = self.case(
                f"{name} {label(size)}",
                lambda peer=peer: size._asdict() | self.timed(lambda: peer(size, self.device)),
            )
            if found is not None:
                self.ms[name, size] = found["ms"]

    def attention(self, size: Size, page_format: str, scores: bool) -> None:
        """A line of decode or scores."""
        op = "scores" if scores else "decode"

        def run() -> dict[str, Any]:
            found = self.timed(lambda: Ours(kernels, size, page_format, scores, self.device))
            fields = {"format": page_format, **size._asdict(), **found}
            names = [f"decode {page_format}"] if scores else ["fa3", "sdpa"]
            for name in names:
                against = self.ms.get((name, size))
                key = "scores_ratio" if scores else f"{name}_ratio"
                fields[key] = None if against is None else round(found["ms"] / against, 4)
            return fields | wanted(fields, scores)

        found = self.case(f"{op} {page_format} {label(size)}", run)
        if found is not None:
            self.ms[f"{op} {page_format}", size] = found["ms"]

    def other(self, name: str, fields: dict[str, Any], make: Callable[[], Any]) -> None:
        """A line of write, move or observe."""
        self.case(name, lambda: fields | self.timed(make))

    def others(self) -> None:
        """Lines of write, move and observe."""
        args, device = self.args, self.device
        heads = args.kv_heads, args.head_dim
        for of in args.formats:
            for tokens in args.write_tokens:
                make = partial(Writing, kernels, of, (tokens, *heads), device)
                self.other(f"write {of} {tokens}", {"format": of, "tokens": tokens}, make)
            make = partial(Moving, kernels, of, (args.move_layers, args.move_pages, *heads), device)
            about = {"format": of, "layers": args.move_layers, "pages": args.move_pages}
            self.other(f"move {of}", about, make)
        for entries in args.entries:
            sequences = min(args.sequences)
            make = partial(Observing, kernels, (sequences, entries, args.heads, *heads), device)
            about = {"sequences": sequences, "entries": entries}
            self.other(f"observe {sequences}x{entries}", about, make)


def wanted(fields: dict[str, Any], scores: bool) -> dict[str, Any]:
    """wanted and met, of the size that figures were set for."""
    page_format = fields["format"]
    if (fields["sequences"], fields["entries"]) != WANTED_AT or page_format not in SHARES:
        return {}
    if scores:
        return common.wanted(fields, {"scores_ratio": ("<=", WITH_SCORES)})
    figures = {
        "bandwidth_share": (">=", SHARES[page_format]),
        "fa3_ratio": ("<=", AGAINST_FA3[page_format]),
    }
    return common.wanted(fields, figures)


def label(size: Size) -> str:
    return f"{size.sequences}x{size.entries}"


def no_flash_attention(device: str) -> str | None:
    """Why vLLM's FlashAttention 3 cannot be called here; None if it can."""
    if device == "cpu":
        return "it runs on GPUs only"
    try:
        from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported

        return None if is_fa_version_supported(3) else str(fa_version_unsupported_reason(3))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def main() -> int:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--sequences", type=int, nargs="+", default=[64, 8], metavar="N", help="default 64 8")
    add("--entries", type=int, nargs="+", default=[8192, 32768], metavar="N",
        help="of a sequence (default 8192 32768)")  # fmt: skip
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT",
        help=f"of {', '.join(FORMATS)} (default all)")  # fmt: skip
    add("--write-tokens", type=int, nargs="+", default=[64, 8192], metavar="N",
        help="default 64 8192")  # fmt: skip
    add("--move-layers", type=int, default=4, metavar="N", help="default 4")
    add("--move-pages", type=int, default=2048, metavar="N",
        help="of a layer; half of them move (default 2048)")  # fmt: skip
    add("--copy-mb", type=int, default=4096, metavar="N", help="default 4096")
    add("--rounds", type=int, default=30, metavar="N", help="medians are over these (default 30)")
    add("--most-sets", type=int, default=64, metavar="N",
        help="of inputs that take turns (default 64)")  # fmt: skip
    args = parser.parse_args()
    run = Run(args)
    torch.manual_seed(run.part.seed)
    run.copy()
    for entries in args.entries:  # what figures are wanted of comes first
        for sequences in args.sequences:
            size = Size(sequences, entries, args.heads, args.kv_heads, args.head_dim)
            run.peers(size)
            for page_format in args.formats:
                for scores in (False, True):
                    run.attention(size, page_format, scores)
    run.others()
    return run.part.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
