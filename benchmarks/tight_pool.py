"""What paged_kv gains where memory is short: long outputs in a pool too small for all of them.

The default pool is 384 pages of 32 tokens of all 30 layers of SmolLM2-135M in bfloat16: 283 MB.
"""

import argparse

from paged_kv.bench import script
from paged_kv.bench.script import PLAIN


def main(args: argparse.Namespace) -> None:
    series = script.against_plain(args, args.pool_tokens, script.independent_rounds(args))
    plain = series[PLAIN]
    for name in args.cases:
        case = {"case": name, **series[name].compared(plain), **series[name].pressure()}
        script.emit("tight_pool", args, {**case, **plain.pressure("baseline_")})


if __name__ == "__main__":
    parser = script.make_parser(
        __doc__,
        rounds=3,
        requests=48,
        prompt_len=128,
        output_len=768,
        pool_tokens=384 * 32,
        budget=256,
    )
    script.add_cases(parser, "streaming", "pyramidal+streaming", "pyramidal+snapkv", "pyramidal")
    script.add_start(parser)
    raise SystemExit(script.run(main, parser))
