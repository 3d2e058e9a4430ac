"""PagedCache against DynamicCache: time per decoded token in transformers.

full    a PagedCache that drops nothing, at --context tokens, for each dtype and batch size
budget  each policy with --budget entries, one sequence, after --long-context processed tokens

Only forward passes of one token per row are timed. The caches step in turn; a round is as many
steps as a page has entries, so that it has one compaction. ms are medians over rounds of the mean
step, ratio is the median over rounds of PagedCache's time by DynamicCache's.
"""

import argparse
import gc
from statistics import mean, median
from typing import Any

import torch
from tqdm import tqdm

from paged_kv.bench import script
from paged_kv.bench.settings import random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.hf import PagedCache
from paged_kv.hf.driver.decoding import DTYPES, Decoder, dynamic_cache, interleaved, load

DYNAMIC = "dynamic"


def main(args: argparse.Namespace) -> None:
    batches = args.batches if "full" in args.cases else []
    policies = args.policies if "budget" in args.cases else []
    total = len(args.dtypes) * (len(batches) + bool(policies))
    with tqdm(total=total, unit="case") as bar:
        for dtype in args.dtypes:
            model = load(args.model, dtype)
            for batch in batches:
                measured = compare(args, model, args.context, batch, {"full": {}})["full"]
                case = {"case": "full", "policy": "full", "dtype": dtype, "batch": batch}
                case["tokens"] = args.context
                script.emit("hf_decode", args, {**case, **measured})
                bar.update()
            if policies:
                own = {"budget": args.budget, "compress_prefill": True}
                options = {policy: {"policy": policy, **own} for policy in policies}
                results = compare(args, model, args.long_context, 1, options)
                for policy, measured in results.items():
                    case = {"case": "budget", "policy": policy, "dtype": dtype, "batch": 1}
                    case["tokens"] = args.long_context
                    script.emit("hf_decode", args, {**case, **measured})
                bar.update()


def compare(
    args: argparse.Namespace,
    model: Any,
    tokens: int,
    batch: int,
    options: dict[str, dict],
    chunk: int = 512,
) -> dict[str, script.Json]:
    """For each PagedCache: milliseconds per token of both, their ratio, and their memory.

    Args:
        args: with model (a directory), seed and rounds.
        model: a causal LM.
        tokens: of a row's context.
        batch: rows.
        options: of each PagedCache, by name; the policy is `full` unless they say another.
        chunk: tokens of a row that are read at once.
    """
    caches = {
        name: PagedCache(model.config, **{"policy": "full", **own}) for name, own in options.items()
    }
    decoders = {DYNAMIC: Decoder(model, dynamic_cache(model), chunk)}
    decoders |= {name: Decoder(model, cache, chunk) for name, cache in caches.items()}
    grown: dict[str, int | None] = {}
    for name, decoder in decoders.items():
        before = allocated(model)
        decoder.read(random_prompts(args.model, batch, tokens, args.seed))
        grown[name] = None if before is None else allocated(model) - before
    interleaved(decoders, 4)  # warms up
    rounds = [interleaved(decoders, DEFAULT_PAGE_SIZE) for _ in range(args.rounds)]
    means = {name: [mean(seconds[name]) for seconds in rounds] for name in decoders}
    results = {}
    for name, cache in caches.items():
        ratios = [own / plain for own, plain in zip(means[name], means[DYNAMIC], strict=True)]
        results[name] = {
            "dynamic_ms": round(1e3 * median(means[DYNAMIC]), 3),
            "paged_ms": round(1e3 * median(means[name]), 3),
            "ratio": round(median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "paged_bytes": cache.stats().bytes,
            "dynamic_torch_bytes": grown[DYNAMIC],
            "paged_torch_bytes": grown[name],
        }
        cache.close()
    return results


def allocated(model: Any) -> int | None:
    """Bytes that torch has given out on the model's GPU; None on a CPU, where it does not count."""
    if model.device.type != "cuda":
        return None
    gc.collect()
    return torch.cuda.memory_allocated(model.device)


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=5, budget=512)
    script.add_cases(parser, "full", "budget")
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} (default both)")  # fmt: skip
    add("--batches", type=script.positive, nargs="+", default=[1, 8], metavar="N",
        help="rows of case full (default 1 8)")  # fmt: skip
    add("--policies", nargs="+", default=["streaming", "snapkv", "h2o"], metavar="POLICY",
        help="of case budget (default streaming snapkv h2o)")  # fmt: skip
    add("--context", type=script.positive, default=2048, metavar="N", help="default 2048")
    add("--long-context", type=script.positive, default=7900, metavar="N",
        help="of case budget (default 7900)")  # fmt: skip
    raise SystemExit(script.run(main, parser))
