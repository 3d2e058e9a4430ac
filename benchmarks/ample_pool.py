"""What paged_kv costs where there is nothing to gain: a pool that holds everything.

Cases, each against plain vLLM with pages of 32 tokens:
  full             the plugin with the policy that keeps everything
  streaming        a budget that no sequence reaches: all bookkeeping, no compaction
  plain_again      plain vLLM against itself: how exact this measurement is
  plain_block_128  plain vLLM with its default page size on CPU
"""

import argparse

from paged_kv.bench import compare, script
from paged_kv.bench.script import PLAIN


def main(args: argparse.Namespace) -> None:
    longest = args.prompt_len + args.output_len
    variants = {
        "full": ({"policy": "full"}, 32),
        "streaming": ({"policy": "streaming", "budget": max(1024, 2 * longest)}, 32),
        "plain_again": ({}, 32),
        "plain_block_128": ({}, None),
    }
    pool_tokens = 2 * args.requests * (longest + 128)
    chosen = {PLAIN: ({}, 32)} | {name: variants[name] for name in args.cases}
    settings = {
        name: script.engine_settings(args, pool_tokens, policy, block_size)
        for name, (policy, block_size) in chosen.items()
    }
    with compare.running(settings, script.warm_up(args)) as engines:
        series = compare.interleave(engines, script.independent_rounds(args))
    for name in args.cases:
        script.emit("ample_pool", args, {"case": name, **series[name].compared(series[PLAIN])})


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=7, requests=16, prompt_len=128, output_len=256)
    script.add_cases(parser, "full", "streaming", "plain_again", "plain_block_128")
    raise SystemExit(script.run(main, parser))
