"""`paged-kv bench memory`: the memory that a sequence holds in vLLM, counted in several places.

An engine for each case, in a process of its own, runs a workload, then a single request of the
length asked for. vLLM's block pool, the page managers, the plan, the tensors and the process must
agree about what is held: if they do not, the figures are printed and the exit status is 1. Fields:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product

from tqdm import tqdm

from paged_kv import results
from paged_kv.bench import arguments, resume
from paged_kv.bench.cases import PEERS, Case, Load
from paged_kv.bench.process import EngineProcess
from paged_kv.bench.rows import case_fields, kept_by_layer, write
from paged_kv.bench.settings import random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.vllm.driver.workload import EngineInfo, EngineSettings, MemoryReport, Workload

TOLERANCE_BYTES, TOLERANCE_SHARE = 4 << 20, 0.02  # by which a process may grow otherwise
COLUMNS = ("policy", "budget", "page_format", "input_len", "score", "kept", "pool_pages",
    "page_bytes", "kv_cache_tokens", "kv_cache_sequences", "decode_sequences", "peak_running",
    "grown_mb")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv bench memory`."""
    arguments.add_shared(parser, policy="plain,pyramidal", input_len=2048, output_len=64,
        requests=8, pool=1.0)  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs, writes, prints. Raises ValueError for what the user got wrong."""
    cases, loads = arguments.read(args)
    runs = [(case, load) for load, case in product(loads, cases)]
    fields = resume.asked(args, "memory", (case_fields(args, *run) for run in runs))
    rows = resume.known(args.out, fields)
    done = len(rows) - rows.count(None)
    resume.tell(args.out, done, len(runs))
    shown, wrong = [], []
    try:
        with tqdm(total=len(runs), initial=done, unit="case", file=sys.stderr) as bar:
            for (case, load), row in zip(runs, rows, strict=True):
                found: list[str] = []
                is_new = row is None
                if row is None:
                    row, found = checked(args, case, load)
                    bar.update()
                if found:  # no result
                    wrong += [f"{case.label}, input-len {load.input_len}: {one}" for one in found]
                    continue
                shown.append(row)
                bar.clear()
                write(args, row, is_new)
    finally:  # what is done is done
        if shown and not args.json:
            results.print_table(shown, COLUMNS)
    for one in wrong:
        print(f"paged-kv bench memory: {one}", file=sys.stderr)
    return 1 if wrong else 0


def checked(args: argparse.Namespace, case: Case, load: Load) -> tuple[results.Row, list[str]]:
    """The row of a case that is measured now, and what in it does not fit together."""
    info, report = measure(args, case, load)
    row = make_row(args, case, load, info, report)
    pool_limit = load.pool_bytes(args.model)
    return row, disagreements(row["kept_by_layer"], load, pool_limit, info, report)


def measure(args: argparse.Namespace, case: Case, load: Load) -> tuple[EngineInfo, MemoryReport]:
    """Starts an engine and lets it work. Raises ValueError if vLLM refuses the case."""
    settings = EngineSettings(
        model=str(args.model),
        pool_bytes=load.pool_bytes(args.model),
        max_model_len=load.max_model_len,
        policy=case.options,
        max_num_seqs=load.requests,
        prefix_caching=False,
        kv_cache_dtype=case.kv_cache_dtype,
        dtype=load.dtype,
    )
    prompts = random_prompts(args.model, load.requests, load.input_len, args.seed)
    with EngineProcess(settings) as engine:
        try:
            info = engine.ready()
        except (ValueError, RuntimeError) as error:
            kind = "peer" if case.policy in PEERS else "policy"
            raise ValueError(f"{kind} {case.label}: vLLM refuses it: {error}") from None
        report = engine.memory(
            Workload(prompts, load.output_len),
            Workload(prompts[:1], load.output_len + 2),  # counted two tokens before its end
        )
    return info, report


def make_row(
    args: argparse.Namespace, case: Case, load: Load, info: EngineInfo, report: MemoryReport
) -> results.Row:
    """The result row of a case."""
    return {
        "task": "memory",
        **case_fields(args, case, load),
        "engine": "vllm",
        "score": report.held_pages * info.page_bytes,
        "metric": "bytes_per_sequence",
        "higher_is_better": False,
        "standard_error": None,
        "samples": 1,
        "seconds": round(report.seconds, 2),
        **results.provenance(args.model),
        "kept_by_layer": kept_by_layer(args, case, load),
        "held_pages": report.held_pages,
        "pool_pages": report.pool_pages,
        "page_bytes": info.page_bytes,
        "tensor_bytes": report.tensor_bytes,
        "beside_bytes": report.beside_bytes,
        "kv_cache_tokens": info.kv_tokens,
        "kv_cache_sequences": round(info.kv_sequences, 2),
        "decode_sequences": round(info.decode_sequences, 2),
        "peak_pages": report.peak_pages,
        "peak_running": report.peak_running,
        "grown_mb": round(report.grown_bytes / 1e6, 1),
    }


def disagreements(
    kept: Sequence[int], load: Load, pool_limit: int, info: EngineInfo, report: MemoryReport
) -> list[str]:
    """What does not fit together, with its figures.

    Args:
        kept: entries of each layer, by the plan.
        load: what was asked for.
        pool_limit: bytes that the engine was given for its cache.
        info: vLLM's figures.
        report: what was counted.
    """
    pool_bytes, tensors = report.pool_pages * info.page_bytes, report.tensor_bytes
    tokens = info.kv_sequences * load.max_model_len
    tolerance = TOLERANCE_BYTES + TOLERANCE_SHARE * tensors
    checks = [
        (
            pool_bytes == tensors,
            f"{report.pool_pages} pages of {info.page_bytes} bytes are {pool_bytes} bytes, but the "
            f"tensors have {tensors}",
        ),
        (
            abs(report.grown_bytes - tensors) <= tolerance,
            f"the process grew by {report.grown_bytes} bytes for tensors of {tensors} (tolerance "
            f"{tolerance:.0f})",
        ),
        (
            tensors + report.beside_bytes <= pool_limit,
            f"tensors of {tensors} bytes and {report.beside_bytes} bytes beside them are more than "
            f"the {pool_limit} that the KV cache was given",
        ),
        (
            abs(tokens - info.kv_tokens) <= 1,
            f"vLLM reports {info.kv_tokens} tokens, but {info.kv_sequences:.2f} sequences of "
            f"{load.max_model_len}",
        ),
    ]
    return [text for agrees, text in checks if not agrees] + _of_sequence(kept, load, report)


def _of_sequence(kept: Sequence[int], load: Load, report: MemoryReport) -> list[str]:
    """The same of the single request."""
    entries = {layer: held for layers, held, _ in report.held_groups for layer in layers}
    by_layer = [entries.get(layer) for layer in range(len(kept))]
    pages = [count for _, _, count in report.held_groups]
    length = load.input_len + load.output_len
    checks = [
        (report.num_tokens == length, f"counted at {report.num_tokens} tokens, not {length}"),
        (
            by_layer == list(kept),
            f"the plan keeps {list(kept)} entries by layer, the engine {by_layer}",
        ),
        (
            sum(pages) == report.held_pages,
            f"the layer groups hold {pages} pages, {report.held_pages} of the pool are in use",
        ),
    ]
    for layers, held, count in report.held_groups:
        slots = count * DEFAULT_PAGE_SIZE  # what a compaction empties is given back one step later
        fits = held <= slots < held + 2 * DEFAULT_PAGE_SIZE
        checks.append((fits, f"layers {layers} hold {held} entries in {count} pages"))
    return [text for agrees, text in checks if not agrees]
