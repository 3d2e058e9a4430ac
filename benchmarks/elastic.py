"""Budgets under pressure: what is lost, and when, from an ample pool to a tight one.

Cases, each against plain vLLM with pages of 32 tokens:
  always     the policy from each prompt's end on
  pressure   the policy when pages run out (start: pressure)
  swap       no policy; preempted requests wait in host memory

The pool holds a share of what all requests need uncompressed; the smallest by default is that of
tight_pool.py. Engines are started anew for each size. Draws results/elastic.png.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from paged_kv.bench import compare, plot, script
from paged_kv.bench.compare import Series, equal_prefix
from paged_kv.bench.script import ALWAYS, PLAIN
from paged_kv.config import PRESSURE

SWAP = "swap"
Lines = dict[str, list[tuple[float, float]]]


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    speed: Lines = defaultdict(list)
    lost: Lines = defaultdict(list)
    for share in args.shares:
        for case in measure(args, share):
            script.emit("elastic", args, case)
            speed[case["case"]].append((share, case["ratio"]))
            lost[case["case"]].append((share, case["lost"]))
    title = f"{args.requests} requests of {args.prompt_len} + {args.output_len} tokens"
    policy = f"{args.policy}, budget {args.budget}"
    plot.elastic(args.out / "elastic.png", f"{title}; {policy}", speed, lost)


def measure(args: argparse.Namespace, share: float) -> list[dict[str, Any]]:
    """The cases' results in a pool of one size."""
    pool_tokens = round(share * args.requests * (args.prompt_len + args.output_len))
    policy = {"policy": args.policy, "budget": args.budget}
    options = {
        PLAIN: {},
        ALWAYS: policy,
        PRESSURE: {**policy, "start": PRESSURE},
        SWAP: {"policy": "full", "swap_space": args.swap_space},
    }
    settings = {
        name: script.engine_settings(args, pool_tokens, options[name])
        for name in (PLAIN, *args.cases)
    }
    with compare.running(settings, script.warm_up(args)) as engines:
        series = compare.interleave(engines, script.independent_rounds(args))
    plain = series[PLAIN]
    return [
        {
            "case": name,
            "share": share,
            "pool_tokens": pool_tokens,
            "lost": share_lost(args, name, series[name]),
            "divergence": divergence(series[name], plain),
            **series[name].compared(plain),
            **series[name].pressure(),
            **plain.pressure("baseline_"),
        }
        for name in args.cases
    ]


def share_lost(args: argparse.Namespace, name: str, series: Series) -> float:
    """Share of the requests that have lost entries."""
    if name == SWAP:
        return 0.0
    shrunk = [result.shrunk for result in series.results]
    if name == PRESSURE:
        return round(mean(number / args.requests for number in shrunk if number is not None), 4)
    return float(args.prompt_len + args.output_len > args.budget)


def divergence(series: Series, plain: Series) -> float:
    """Share of the tokens from the first one on that plain vLLM has otherwise."""
    pairs = zip(series.results, plain.results, strict=True)
    outputs = [
        pair for one, other in pairs for pair in zip(one.outputs, other.outputs, strict=True)
    ]
    return round(mean(1 - equal_prefix(*pair) / len(pair[0]) for pair in outputs), 4)


if __name__ == "__main__":
    parser = script.make_parser(
        __doc__, rounds=1, requests=48, prompt_len=128, output_len=768, budget=256
    )
    parser.add_argument("--policy", default="pyramidal", help="default pyramidal")
    script.add_cases(parser, ALWAYS, PRESSURE, SWAP)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[1.1, 0.7, 0.5, 0.4, 0.286],
        metavar="F",
        help="sizes of the pool, over what all requests need (default 1.1 ... 0.286)",
    )
    parser.add_argument(
        "--swap-space", type=float, default=1.0, metavar="GIB", help="for swap (default 1.0)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default results/")
    raise SystemExit(script.run(main, parser))
