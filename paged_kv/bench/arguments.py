"""The options that throughput, latency and memory share, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paged_kv import models, registry
from paged_kv.bench.cases import PEERS, Case, Load, check, read_cases, read_loads
from paged_kv.bench.script import add_dtype, positive
from paged_kv.bench.settings import resolved_dtype
from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.variants import SHARED, SYNTAX


def add_shared(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options of all three; defaults: policy, input_len, output_len, requests, pool."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--policy", default=defaults["policy"], metavar=SYNTAX, help=f"peers "
        f"({', '.join(PEERS)}: vLLM as it is) and policies ({', '.join(registry.available())}); "
        f"default {defaults['policy']}")  # fmt: skip
    add("--budget", default="256", metavar="B[,B...]", help="entries kept per layer, or with a "
        "point the fraction kept (default 256; ignored by peers and full)")  # fmt: skip
    add("--page-format", default=NATIVE, metavar="F[,F...]",
        help=f"{', '.join(FORMATS)}, or files of paged-kv calibrate formats; of the policies "
             "(default native)")  # fmt: skip
    add("--policy-config", metavar="JSON", help=SHARED)
    add("--pool", type=listed(pool), default=[defaults["pool"]], metavar="S[,S...]",
        help="memory of the KV cache: with a point the share of what all requests need "
             "uncompressed, else tokens that fit in uncompressed (default "
             f"{defaults['pool']})")  # fmt: skip
    add("--input-len", type=listed(positive), default=[defaults["input_len"]], metavar="N[,N...]",
        help=f"tokens of a prompt (default {defaults['input_len']})")  # fmt: skip
    add("--output-len", type=positive, default=defaults["output_len"], metavar="N",
        help=f"tokens generated for each (default {defaults['output_len']})")  # fmt: skip
    add("--requests", type=listed(positive), default=[defaults["requests"]], metavar="N[,N...]",
        help=f"how many (default {defaults['requests']})")  # fmt: skip
    add_dtype(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the random prompts (default 0)")
    add("--out", type=Path, metavar="FILE", help="result rows are appended to it; the same command "
        "again measures only what is not there yet")  # fmt: skip
    add("--json", action="store_true", help="print the rows, one JSON object per line, instead of "
        "a table")  # fmt: skip


def read(args: argparse.Namespace) -> tuple[list[Case], list[Load]]:
    """What to compare and with which loads; args.model becomes a directory. Raises ValueError."""
    start = getattr(args, "start", None)
    cases = read_cases(args.policy, args.budget, args.page_format, start, args.policy_config)
    args.model = models.resolve(args.model)
    sizes = args.input_len, args.output_len, args.requests, args.pool
    loads = read_loads(args.model, *sizes, resolved_dtype(args.dtype))
    check(cases, args.model)
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.open("a").close()
        except OSError as error:
            raise ValueError(f"out {args.out}: {error.strerror}") from None
    return cases, loads


def listed(read_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """For argparse: values with commas between."""

    def read_all(text: str) -> list[Any]:
        return [read_one(part) for part in text.split(",")]

    return read_all


def pool(text: str) -> int | float:
    """For argparse: a number of tokens, or with a point a share."""
    if "." not in text:
        return positive(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1e6:
        raise argparse.ArgumentTypeError(f"must be a share above 0 or tokens, not {text!r}")
    return share


def rate(text: str) -> float:
    """For argparse: requests per second; inf for all at once."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, or inf for all at once, not {text!r}")
    return value
