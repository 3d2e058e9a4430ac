"""What swapping preempted requests to host memory gains over computing them again, and its cost.

    preempted   all running requests are preempted every --preempt-every steps
    growing     requests are preempted when the pool is full, as vLLM does by itself
    ample       a pool for everybody: nobody is preempted, and the swap has nothing to do

The first two have a pool for 40 % of the prompts, in which the others wait. The baseline is plain
vLLM with pages of the same size.
"""

import argparse

from paged_kv.bench import compare, script
from paged_kv.bench.script import PLAIN
from paged_kv.vllm.driver.workload import Workload

SWAP = "swap"
POOL_SHARE = 0.4  # of the prompts
CASES = ("preempted", "growing", "ample")


def main(args: argparse.Namespace) -> None:
    option = {"policy": "full", "swap_space": args.swap_space}
    for case in args.cases:
        tokens = args.requests * (args.prompt_len + args.output_len)
        if case != "ample":
            tokens = int(POOL_SHARE * args.requests * args.prompt_len)
        settings = {
            PLAIN: script.engine_settings(args, tokens),
            SWAP: script.engine_settings(args, tokens, option),
        }
        with compare.running(settings, script.warm_up(args)) as engines:
            series = compare.interleave(engines, rounds(args, case))
        plain, swap = series[PLAIN], series[SWAP]
        assert swap.results[-1].preemptions or case != "preempted"
        results = {**swap.compared(plain), **swap.pressure(), **plain.pressure("baseline_")}
        results["computed_tokens"] = swap.results[-1].computed_tokens
        results["baseline_computed_tokens"] = plain.results[-1].computed_tokens
        script.emit("swap", args, {"case": case, **results})


def rounds(args: argparse.Namespace, case: str) -> list[list[Workload]]:
    """args.rounds rounds of one workload each."""
    every = args.preempt_every if case == "preempted" else 0
    plain = script.independent_rounds(args)
    return [[Workload(one.prompts, one.output_len, preempt_every=every) for one in own]
            for own in plain]  # fmt: skip


if __name__ == "__main__":
    parser = script.make_parser(
        __doc__, rounds=3, requests=12, prompt_len=3072, output_len=256, preempt_every=128
    )
    parser.add_argument(
        "--swap-space",
        type=float,
        default=1.0,
        metavar="GIB",
        help="host memory for swapped pages (default 1.0)",
    )
    script.add_cases(parser, *CASES)
    raise SystemExit(script.run(main, parser))
