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

from tqdm import tqdm

from paged_kv import results
from paged_kv.bench import arguments
from paged_kv.bench.cases import PEERS, Case, Load
from paged_kv.bench.process import EngineProcess
from paged_kv.bench.rows import case_fields, kept_by_layer, print_table, write
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
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
    shown, wrong = [], []
    try:
        for load in loads:
            for case in tqdm(cases, unit="case", file=sys.stderr):
                info, report = measure(args, case, load)
                row = make_row(args, case, load, info, report)
                pool_limit = load.pool_tokens * kv_bytes_per_token(args.model)
                found = disagreements(row["kept_by_layer"], load, pool_limit, info, report)
                if found:
                    wrong += [f"{case.label}, input-len {load.input_len}: {one}" for one in found]
                    continue  # no result
                shown.append(row)
                write(args, row)
    finally:  # what is done is done
        if shown and not args.json:
            print_table(COLUMNS, shown)
    for one in wrong:
        print(f"paged-kv bench memory: {one}", file=sys.stderr)
    return 1 if wrong else 0


def measure(args: argparse.Namespace, case: Case, load: Load) -> tuple[EngineInfo, MemoryReport]:
    """Starts an engine and lets it work. Raises ValueError if vLLM refuses the case."""
    settings = EngineSettings(
        model=str(args.model),
        pool_bytes=load.pool_tokens * kv_bytes_per_token(args.model),
        max_model_len=load.max_model_len,
        policy=case.options,
        max_num_seqs=load.requests,
        prefix_caching=False,
        kv_cache_dtype=case.kv_cache_dtype,
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
    found = []
    pool_bytes = report.pool_pages * info.page_bytes
    if pool_bytes != report.tensor_bytes:
        found.append(
            f"{report.pool_pages} pages of {info.page_bytes} bytes are {pool_bytes} bytes, but the "
            f"tensors have {report.tensor_bytes}"
        )
    if info.num_pages + 1 != report.pool_pages:
        found.append(f"vLLM reports {info.num_pages + 1} pages, its pool has {report.pool_pages}")
    tokens = info.kv_sequences * load.max_model_len
    if abs(tokens - info.kv_tokens) > 1:
        found.append(
            f"vLLM reports {info.kv_tokens} tokens, but {info.kv_sequences:.2f} sequences of "
            f"{load.max_model_len}"
        )
    if report.num_tokens != load.input_len + load.output_len:
        found.append(f"counted at {report.num_tokens} tokens")
    entries = {layer: held for layers, held, _ in report.held_groups for layer in layers}
    if entries != dict(enumerate(kept)):
        by_layer = [entries.get(layer) for layer in range(len(kept))]
        found.append(f"the plan keeps {list(kept)} entries by layer, the engine {by_layer}")
    pages = [group_pages for _, _, group_pages in report.held_groups]
    if sum(pages) != report.held_pages:
        found.append(f"the groups have {pages} pages, of the pool {report.held_pages} are in use")
    for layers, held, group_pages in report.held_groups:
        slots = group_pages * DEFAULT_PAGE_SIZE  # what a compaction emptied goes at the next step
        if not held <= slots < held + 2 * DEFAULT_PAGE_SIZE:
            found.append(f"layers {layers} hold {held} entries in {group_pages} pages")
    tolerance = TOLERANCE_BYTES + TOLERANCE_SHARE * report.tensor_bytes
    if abs(report.grown_bytes - report.tensor_bytes) > tolerance:
        found.append(
            f"the process grew by {report.grown_bytes} bytes for tensors of {report.tensor_bytes} "
            f"(tolerance {tolerance:.0f})"
        )
    taken = report.tensor_bytes + report.beside_bytes
    if taken > pool_limit:
        found.append(
            f"tensors of {report.tensor_bytes} bytes and {report.beside_bytes} beside them are "
            f"more than the {pool_limit} that the KV cache was given"
        )
    return found
