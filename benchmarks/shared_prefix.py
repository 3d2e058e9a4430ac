"""Prompts that begin alike, in an ample pool: whether the prefix cache still does its work.

A round is some waves of requests with one common prefix; the first finds an empty prefix cache.
Within a wave, too, later requests find what earlier ones computed.
"""

import argparse

from paged_kv.bench import script
from paged_kv.bench.script import PLAIN
from paged_kv.bench.settings import random_prompts
from paged_kv.vllm.driver.workload import Workload


def main(args: argparse.Namespace) -> None:
    args.prompt_len = args.prefix_len + args.suffix_len
    pool_tokens = 2 * args.requests * (args.prompt_len + args.output_len + 32)
    rounds = [waves(args, args.seed + number) for number in range(args.rounds)]
    series = script.against_plain(args, pool_tokens, rounds)
    plain = series[PLAIN]
    for name in args.cases:
        hits = {
            "hit_rate": round(series[name].hit_rate, 4),
            "baseline_hit_rate": round(plain.hit_rate, 4),
        }
        script.emit("shared_prefix", args, {"case": name, **series[name].compared(plain), **hits})


def waves(args: argparse.Namespace, seed: int) -> list[Workload]:
    """One round."""
    (prefix,) = random_prompts(args.model, 1, args.prefix_len, seed)
    count = args.waves * args.requests
    suffixes = random_prompts(args.model, count, args.suffix_len, seed + 1000)
    return [
        Workload(
            [prefix + suffix for suffix in suffixes[start : start + args.requests]],
            args.output_len,
            reset_prefix_cache=start == 0,
        )
        for start in range(0, count, args.requests)
    ]


if __name__ == "__main__":
    parser = script.make_parser(
        __doc__,
        rounds=5,
        waves=3,
        requests=32,
        prefix_len=768,
        suffix_len=32,
        output_len=32,
        budget=256,
    )
    script.add_cases(parser, "streaming", "pyramidal+streaming", "pyramidal")
    script.add_start(parser)
    raise SystemExit(script.run(main, parser))
