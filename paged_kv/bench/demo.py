"""`paged-kv demo`: a batch that does not fit, with vLLM as it is and with a compressed cache.

Both get the same prompts, the same memory for the KV cache and the same page size. Prints a table
and writes demo.json and demo.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paged_kv import models
from paged_kv.bench import prompts
from paged_kv.bench.compare import advance, equal_prefix
from paged_kv.bench.process import EngineProcess
from paged_kv.bench.script import add_dtype, add_start, as_json, positive
from paged_kv.bench.settings import decoder_config, kv_bytes_per_token, resolved_dtype
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.vllm.driver.workload import EngineInfo, EngineSettings, RunResult, Tokens, Workload

PLAIN = "plain vLLM"
TEMPLATE_TOKENS = 96  # a chat template adds at most so many
MAX_POINTS = 500  # of a line in the plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv demo`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add(
        "--policy",
        default="pyramidal",
        help="what to compare plain vLLM with (default pyramidal)",
    )
    add("--budget", default="256", help="entries kept per sequence and layer (default 256)")
    add_start(parser)
    add_dtype(parser)
    add("--requests", type=positive, default=40, metavar="N", help="default 40")
    add("--max-tokens", type=positive, default=640, metavar="N", help="output length, default 640")
    add(
        "--pool-tokens",
        type=positive,
        default=12288,
        metavar="N",
        help="tokens that fit into the KV cache uncompressed (default 12288)",
    )
    add("--prompts", type=Path, metavar="FILE", help="one prompt per line, instead of ours")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default results/")


def main(args: argparse.Namespace) -> None:
    """Runs both, prints, writes. Raises ValueError for what the user got wrong."""
    start = time.perf_counter()
    texts = (
        prompts.built_in(args.requests)
        if args.prompts is None
        else prompts.from_file(args.prompts, args.requests)
    )
    policy = {"policy": args.policy, "budget": args.budget, "start": args.start}
    CompressionConfig.from_dict(policy)
    model = models.resolve(args.model)
    args.dtype = resolved_dtype(args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    options = {PLAIN: {}, args.policy: policy}
    settings = {name: _settings(args, model, texts, fields) for name, fields in options.items()}
    runs: dict[str, tuple[EngineInfo, RunResult]] = {}
    with tqdm(total=len(settings) * args.requests * args.max_tokens, unit="tok") as bar:
        for name, config in settings.items():
            runs[name] = _run(name, config, texts, args.max_tokens, bar)
    report = _report(args, runs)
    report["total_seconds"] = round(time.perf_counter() - start, 1)
    _print_table(report)
    _write(args.out, report, runs)


def _settings(
    args: argparse.Namespace, model: Path, texts: list[str], policy: dict[str, Any]
) -> EngineSettings:
    # A token is at least one byte of text.
    needed = max(len(text.encode()) for text in texts) + TEMPLATE_TOKENS + args.max_tokens
    whole_pages = -(-needed // DEFAULT_PAGE_SIZE) * DEFAULT_PAGE_SIZE
    limit = decoder_config(model).get("max_position_embeddings", whole_pages)
    return EngineSettings(
        model=str(model),
        pool_bytes=args.pool_tokens * kv_bytes_per_token(model, args.dtype),
        max_model_len=min(whole_pages, limit),
        policy=policy,
        max_num_seqs=args.requests,
        dtype=args.dtype,
    )


def _run(
    name: str, settings: EngineSettings, texts: list[str], max_tokens: int, bar: Any
) -> tuple[EngineInfo, RunResult]:
    bar.set_description(f"{name}: starting")
    with EngineProcess(settings) as engine:
        info = engine.ready()
        tokens: list[Tokens] = engine.encode(texts)
        engine.run(Workload(tokens[:2], 4))  # the first steps are slow
        bar.set_description(name)
        target = bar.n + len(tokens) * max_tokens
        result = engine.run(Workload(tokens, max_tokens), advance(bar))
        bar.update(target - bar.n)
        return info, result


def _report(
    args: argparse.Namespace, runs: dict[str, tuple[EngineInfo, RunResult]]
) -> dict[str, Any]:
    (_, plain), (_, compressed) = runs.values()
    equal = [equal_prefix(*pair) for pair in zip(plain.outputs, compressed.outputs, strict=True)]
    same = [
        sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0])
        for pair in zip(plain.outputs, compressed.outputs, strict=True)
    ]
    return {
        "settings": as_json(args),
        "engines": {name: _figures(*run) for name, run in runs.items()},
        "speed_ratio": round(compressed.tokens_per_second / plain.tokens_per_second, 3),
        "agreement": {
            "tokens_to_first_difference": statistics.median(equal),
            "share_to_first_difference": round(statistics.mean(equal) / args.max_tokens, 4),
            "share_of_equal_tokens": round(statistics.mean(same), 4),
        },
    }


def _figures(info: EngineInfo, result: RunResult) -> dict[str, float]:
    return {
        "kv_cache_tokens": info.kv_tokens,
        "kv_cache_sequences": round(info.kv_sequences, 2),
        "decode_sequences": round(info.decode_sequences, 2),
        "pool_pages": info.num_pages,
        "page_bytes": info.page_bytes,
        "peak_pages": result.peak_pages,
        "peak_mb": round(result.peak_pages * info.page_bytes / 1e6, 1),
        "peak_running": result.peak_running,
        "preemptions": result.preemptions,
        "output_tokens": result.output_tokens,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "seconds": round(result.seconds, 1),
        "start_seconds": round(info.start_seconds, 1),
    }


_ROWS = {
    "kv_cache_tokens": "KV cache as vLLM reports it (tokens)",
    "kv_cache_sequences": "  ... in longest sequences",
    "decode_sequences": "longest sequences that can decode at once",
    "pool_pages": "pages in the pool",
    "page_bytes": "bytes of a page (the layers of one group)",
    "peak_pages": "most pages in use",
    "peak_mb": "  ... in MB",
    "peak_running": "most sequences running at once",
    "preemptions": "preemptions",
    "output_tokens": "output tokens",
    "seconds": "seconds",
    "tokens_per_second": "output tokens per second",
}


def _print_table(report: dict[str, Any]) -> None:
    engines = report["engines"]
    sys.stderr.flush()
    print(f"\n{'':44}" + "".join(f"{name:>22}" for name in engines))
    for key, label in _ROWS.items():
        print(f"{label:44}" + "".join(f"{figures[key]:>22,}" for figures in engines.values()))
    agreement = report["agreement"]
    print(
        f"\nspeed: {report['speed_ratio']:.2f} x in {report['settings']['dtype']}. "
        f"Outputs agree for {agreement['tokens_to_first_difference']:.0f} tokens (median), "
        f"{agreement['share_to_first_difference']:.0%} of the tokens come before the first "
        f"difference, {agreement['share_of_equal_tokens']:.0%} are equal in place.\n"
        f"total: {report['total_seconds']:.0f} s"
    )


def _write(
    directory: Path, report: dict[str, Any], runs: dict[str, tuple[EngineInfo, RunResult]]
) -> None:
    from paged_kv.bench import plot

    timelines = {name: _timeline(*run) for name, run in runs.items()}
    (directory / "demo.json").write_text(json.dumps({**report, "timelines": timelines}) + "\n")
    info = next(iter(runs.values()))[0]
    speeds = {name: figures["tokens_per_second"] for name, figures in report["engines"].items()}
    title = (
        f"{len(next(iter(runs.values()))[1].outputs)} requests, "
        f"{report['settings']['max_tokens']} output tokens each, one pool size"
    )
    plot.demo(
        directory / "demo.png", title, timelines, speeds, info.num_pages * info.page_bytes / 1e6
    )
    print(f"wrote {directory / 'demo.json'} and {directory / 'demo.png'}")


def _timeline(info: EngineInfo, result: RunResult) -> dict[str, list[float]]:
    stride = -(-len(result.steps) // MAX_POINTS)
    steps = [*result.steps[::stride], result.steps[-1]]
    return {
        "seconds": [round(step.end, 3) for step in steps],
        "used_mb": [round(step.pages * info.page_bytes / 1e6, 2) for step in steps],
        "running": [step.running for step in steps],
    }
