"""What a policy loses in a real batch: divergence from the full cache, always and under pressure.

The prompts are the demo's. An engine with room for everything draws outputs from the model's own
distribution; then engines with the demo's pool are given these outputs, token by token, and say how
likely they find them. The mean difference of the logarithms estimates the Kullback-Leibler
divergence from the full cache. `full` says what another batch and another kernel come to.
"""

import argparse
import os
from statistics import mean, stdev
from typing import Any

from paged_kv.bench import prompts, script
from paged_kv.bench.script import ALWAYS
from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import PRESSURE
from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, Tokens

FULL = "full"


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    from paged_kv.vllm.driver import forced

    texts = prompts.built_in(args.requests)
    engine = make(args, {}, 2 * args.requests * args.max_len)
    tokens = engine.encode(texts)
    drawn = forced.sampled(engine.llm, tokens, args.output_len, args.seed)
    engine.close()
    outputs = [list(one.token_ids) for one in drawn]
    likely = [forced.logprobs(one) for one in drawn]
    for name in args.cases:
        policy = {"policy": args.policy, "budget": args.budget, "start": name}
        case = measure(args, {} if name == FULL else policy, tokens, outputs, likely)
        script.emit("divergence", args, {"case": name, **case})


def measure(
    args: argparse.Namespace,
    policy: dict[str, Any],
    tokens: list[Tokens],
    outputs: list[Tokens],
    likely: list[list[float]],
) -> dict[str, Any]:
    """What one engine makes of the outputs, and how far it had to go."""
    from paged_kv.vllm.driver import forced

    engine = make(args, policy, args.pool_tokens, logits_processors=[forced.Forcing])
    found = forced.forced(engine.llm, tokens, outputs)
    assert [list(one.token_ids) for one in found] == outputs
    pressure = getattr(engine.core.scheduler, "pressure", None)
    shrunk = 0 if pressure is None else pressure.counts["shrunk_requests"]
    engine.close()
    gaps = [
        mean(full - ours for full, ours in zip(before, forced.logprobs(one), strict=True))
        for before, one in zip(likely, found, strict=True)
    ]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return {"divergence": round(mean(gaps), 5), "standard_error": round(error, 5), "shrunk": shrunk}


def make(args: argparse.Namespace, policy: dict[str, Any], pool: int, **more: Any) -> Engine:
    """An engine of this process with room for so many tokens, uncompressed."""
    pool_bytes = pool * kv_bytes_per_token(args.model)
    settings = EngineSettings(
        str(args.model), pool_bytes, args.max_len, policy, max_num_seqs=args.requests
    )
    return Engine(settings, **more)


if __name__ == "__main__":
    parser = script.make_parser(
        __doc__, requests=40, output_len=640, pool_tokens=12288, budget=256, max_len=864
    )
    parser.add_argument("--policy", default="pyramidal", help="default pyramidal")
    script.add_cases(parser, FULL, ALWAYS, PRESSURE)
    raise SystemExit(script.run(main, parser))
