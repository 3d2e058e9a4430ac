"""What paged_kv costs where nothing is evicted, with both engines in one process.

The other scripts give every engine a process of its own, whose memory lies somewhere else: two
plain engines can differ by some percent for a whole run. Here they share one allocator and one set
of threads, and take turns.
"""

import argparse
import os
from statistics import median

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, RunResult, Workload


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    max_len = args.prompt_len + args.output_len + 1
    pool_bytes = (args.requests + 1) * max_len * kv_bytes_per_token(args.model)
    unreached = {"policy": "streaming", "budget": max_len + 64}
    engines = [
        Engine(EngineSettings(str(args.model), pool_bytes, max_len, policy))
        for policy in ({}, unreached)
    ]
    prompts = random_prompts(args.model, args.requests, args.prompt_len, args.seed)
    workload = Workload(prompts, args.output_len)
    ratios = []
    for round_ in range(args.rounds + 1):
        plain, policy = (run(engine, workload).tokens_per_second for engine in engines)
        if round_:  # the first warms up
            ratios.append(policy / plain)
    case = {"case": "streaming", "ratio": round(median(ratios), 4)}
    script.emit("same_process", args, {**case, "ratios": [round(ratio, 4) for ratio in ratios]})


def run(engine: Engine, workload: Workload) -> RunResult:
    """Runs the workload to its end."""
    *_, result = engine.run(workload)
    assert isinstance(result, RunResult)
    return result


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=6, requests=16, prompt_len=1024, output_len=64)
    raise SystemExit(script.run(main, parser))
