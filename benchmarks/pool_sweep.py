"""From an ample pool to a tight one: where compression begins to pay.

The pool holds a share of what all requests need uncompressed. Engines are started anew for each
size. Draws results/pool_sweep.png.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from paged_kv.bench import plot, script
from paged_kv.bench.script import PLAIN


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    lines = defaultdict(list)
    for output_len in args.output_lens:
        sized = argparse.Namespace(**vars(args), output_len=output_len)
        for share in args.shares:
            for name, ratio in measure(sized, share).items():
                lines[f"{name}, outputs of {output_len}"].append((share, ratio))
    title = f"{args.requests} requests, budget {args.budget}"
    plot.ratios(args.out / "pool_sweep.png", title, lines)


def measure(args: argparse.Namespace, share: float) -> dict[str, float]:
    """Ratio of each policy in a pool of one size."""
    pool_tokens = round(share * args.requests * (args.prompt_len + args.output_len))
    series = script.against_plain(args, pool_tokens, script.independent_rounds(args))
    plain = series[PLAIN]
    size = {"output_len": args.output_len, "share": share, "pool_tokens": pool_tokens}
    ratios = {}
    for name in args.cases:
        compared = series[name].compared(plain)
        case = {"case": name, **size, **compared, **series[name].pressure()}
        script.emit("pool_sweep", args, {**case, **plain.pressure("baseline_")})
        ratios[name] = compared["ratio"]
    return ratios


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=1, requests=32, prompt_len=128, budget=256)
    script.add_cases(parser, "streaming", "pyramidal+streaming", default=["streaming"])
    parser.add_argument(
        "--output-lens",
        type=script.positive,
        nargs="+",
        default=[768, 2048],
        metavar="N",
        help="tokens generated for each request (default 768 2048)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[1.1, 0.7, 0.5, 0.35, 0.25, 0.18],
        metavar="F",
        help="sizes of the pool, over what all requests need (default 1.1 ... 0.18)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default results/")
    raise SystemExit(script.run(main, parser))
