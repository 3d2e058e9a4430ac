"""Result rows of throughput, latency and memory: the fields that say what ran, and their table."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

from paged_kv.bench.cases import Case, Load, number_bytes
from paged_kv.bench.held import entries, entry_bytes, layer_schedules
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.core.options import parse_json
from paged_kv.results import Row, append


def case_fields(args: argparse.Namespace, case: Case, load: Load) -> Row:
    """Which case and load, and what a sequence of it holds at its end.

    What is kept under pressure nobody knows beforehand: null.
    """
    kept = kept_by_layer(args, case, load)
    num_bytes = held_bytes(args, case, load, kept)
    length = load.input_len + load.output_len
    known = not case.config.waits_for_pressure
    return {
        "policy": case.policy,
        "budget": case.shown_budget,
        "page_format": case.page_format,
        "kept": round(statistics.fmean(kept), 2) if known else None,
        "bytes_per_token": round(num_bytes / length, 2) if known else None,
        "start": case.config.start if case.config.enabled else None,
        "pool_tokens": load.pool_tokens,
        "share": round(load.share, 4),
        "input_len": load.input_len,
        "output_len": load.output_len,
        "requests": load.requests,
        "dtype": load.dtype,
        **of_all(args),
    }


def of_all(args: argparse.Namespace) -> Row:
    """Those fields of results.OF_ALL that a command with such options was given."""
    fields: Row = {}
    if getattr(args, "page_size", DEFAULT_PAGE_SIZE) != DEFAULT_PAGE_SIZE:
        fields["page_size"] = args.page_size
    if getattr(args, "residual_pages", 0):
        fields["residual_pages"] = args.residual_pages
    given = getattr(args, "policy_config", None)
    if options := parse_json(given, "policy-config") if given else {}:
        fields["policy_config"] = dict(sorted(options.items()))
    return fields


def kept_by_layer(args: argparse.Namespace, case: Case, load: Load) -> list[int]:
    """Entries of each layer when prompt and output are done."""
    schedules = layer_schedules(case.config, args.model, DEFAULT_PAGE_SIZE)
    return entries(schedules, load.input_len + load.output_len, load.input_len)


def held_bytes(args: argparse.Namespace, case: Case, load: Load, kept: Sequence[int]) -> int:
    """Of so many entries in each layer, as pages store them."""
    import torch

    dtype = getattr(torch, load.dtype)
    native_bytes = number_bytes(case.policy)
    sizes = entry_bytes(case.config, args.model, DEFAULT_PAGE_SIZE, dtype, native_bytes)
    return sum(count * size for count, size in zip(kept, sizes, strict=True))


def write(args: argparse.Namespace, row: Row, is_new: bool) -> None:
    """To args.out if there is one and it is not there yet, and with args.json to stdout."""
    if is_new and args.out is not None:
        append(args.out, row)
    if args.json:
        print(json.dumps(row), flush=True)
