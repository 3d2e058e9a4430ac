"""`paged-kv bench cache-speedup`: what a token costs with a cache and without one.

One sequence, in transformers: a PagedCache that drops nothing against use_cache=False. At each
context length both produce one token in turn, so many times as there are rounds; the time of a
token is that of one forward pass, without the prompt's, and the figures are medians. Both contexts
grow by a token in each round. Prints a result row per length, keeps it in cache_speedup.jsonl, and
draws cache_speedup.png. What that file has of the same command is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paged_kv import models, registry, results
from paged_kv.bench import resume, script
from paged_kv.bench.settings import (
    decoder_config,
    kv_bytes_per_token,
    random_prompts,
)
from paged_kv.core.page_formats import NATIVE

LENGTHS = (50, 200, 800, 2000)
CACHED, UNCACHED = "PagedCache", "no cache"
ENGINE = "transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv bench cache-speedup`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--lengths", type=script.positive, nargs="+", default=list(LENGTHS), metavar="N",
        help=f"tokens of context (default {' '.join(map(str, LENGTHS))})")  # fmt: skip
    add("--rounds", type=script.positive, default=5, metavar="N",
        help="tokens that are timed at each length (default 5)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--seed", type=int, default=0, metavar="N", help="of the random prompt (default 0)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="rows and plot; what is "
        "there is not measured again (default results/)")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs, prints, draws. Raises ValueError for what the user got wrong."""
    args.model = models.resolve(args.model)
    longest = max(args.lengths) + args.rounds + 1
    limit = decoder_config(args.model).get("max_position_embeddings", longest)
    if longest > limit:
        raise ValueError(
            f"lengths {max(args.lengths)} with rounds {args.rounds}: needs {longest} tokens, "
            f"the model has {limit}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {args.out} must be a directory: {error.strerror}") from None
    cases = measure(args)
    from paged_kv.bench import plot

    times = {
        name: [(case["length"], case[f"{key}_ms"]) for case in cases]
        for name, key in ((UNCACHED, "uncached"), (CACHED, "cached"))
    }
    title = f"{args.model.name}, {args.dtype}: time per generated token"
    plot.per_token(args.out / "cache_speedup.png", title, times)


def measure(args: argparse.Namespace) -> list[results.Row]:
    """A case for each length, printed when it is known."""
    from paged_kv.hf.driver.decoding import load

    out = args.out / "cache_speedup.jsonl"
    lengths = sorted(args.lengths)
    fields = ({"length": length, "dtype": args.dtype} for length in lengths)
    known = resume.known(out, resume.asked(args, "cache-speedup", fields, ENGINE))
    done = len(known) - known.count(None)
    resume.tell(out, done, len(known))
    model = load(args.model, args.dtype) if None in known else None
    cases = []
    with tqdm(total=len(known), initial=done, unit="length") as bar:
        for length, row in zip(lengths, known, strict=True):
            if row is None:
                row = make_row(args, length, decode(args, model, length))
                results.append(out, row)
                bar.update()
            cases.append(row)
            script.emit("cache_speedup", args, row)
    return cases


def decode(args: argparse.Namespace, model: Any, length: int) -> dict[str, list[float]]:
    """Seconds of each token with a cache and without."""
    from paged_kv.hf import PagedCache
    from paged_kv.hf.driver.decoding import Decoder, interleaved

    with PagedCache(model.config, "full") as cache:
        decoders = {CACHED: Decoder(model, cache), UNCACHED: Decoder(model)}
        for decoder in decoders.values():
            decoder.read(random_prompts(args.model, 1, length, args.seed))
        interleaved(decoders, 1)  # the first pass of a shape is slow
        return interleaved(decoders, args.rounds)


def make_row(
    args: argparse.Namespace, length: int, seconds: Mapping[str, Sequence[float]]
) -> results.Row:
    """The result row of a length, from the seconds of each token with a cache and without."""
    cached, uncached = (1e3 * statistics.median(seconds[name]) for name in (CACHED, UNCACHED))
    return {
        "task": "cache-speedup",
        "policy": registry.FULL,
        "budget": None,
        "page_format": NATIVE,
        "engine": ENGINE,
        "score": round(uncached / cached, 2),
        "metric": "speedup",
        "higher_is_better": True,
        "standard_error": None,
        "samples": args.rounds,
        "kept": length,
        "bytes_per_token": kv_bytes_per_token(args.model, args.dtype),
        "seconds": round(sum(map(sum, seconds.values())), 3),
        **results.provenance(args.model, engine=ENGINE),
        "length": length,
        "dtype": args.dtype,
        "cached_ms": round(cached, 3),
        "uncached_ms": round(uncached, 3),
        "speedup": round(uncached / cached, 2),
    }
