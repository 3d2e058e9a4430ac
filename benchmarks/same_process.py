"""What policies cost in a decode step, with all engines in one process.

The other scripts give every engine a process of its own, whose memory lies somewhere else: two
plain engines can differ by some percent for a whole run. Here they share one allocator and one set
of threads, and take turns: in each round every case after the one that it is compared with. By
default nothing is evicted: the budget is more than anybody reaches.
"""

import argparse
import os
from statistics import median
from typing import Any

from paged_kv import registry
from paged_kv.bench import script
from paged_kv.bench.script import PLAIN
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, Workload


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    max_len = args.prompt_len + args.output_len + 1
    budget = args.budget or 2 * max_len + 64  # the last layers of a pyramid have less
    for name in (*args.cases, args.against):
        if name != PLAIN:
            registry.check(name)
    # A query ring and side data take their part of it.
    pool_bytes = 2 * (args.requests + 1) * max_len * kv_bytes_per_token(args.model)
    engines = {
        name: Engine(
            EngineSettings(
                str(args.model), pool_bytes, max_len, policy_of(name, budget, args.start)
            )
        )
        for name in dict.fromkeys((args.against, *args.cases))
    }
    prompts = random_prompts(args.model, args.requests, args.prompt_len, args.seed)
    # Prompts are computed once: only steps that decode are timed.
    workload = Workload(prompts, args.output_len, reset_prefix_cache=False)
    ratios: dict[str, list[float]] = {name: [] for name in args.cases}
    for round_ in range(args.rounds + 1):
        for name in args.cases:
            base, policy = (run(engines[each], workload) for each in (args.against, name))
            if round_:  # the first warms up
                ratios[name].append(policy / base)
    for name, found in ratios.items():
        rounded = [round(ratio, 4) for ratio in found]
        case = {"case": name, "against": args.against, "ratio": round(median(found), 4)}
        script.emit("same_process", args, {**case, "ratios": rounded})


def policy_of(name: str, budget: int, start: str) -> dict[str, Any]:
    """An engine's options."""
    return {} if name == PLAIN else {"policy": name, "budget": budget, "start": start}


def run(engine: Engine, workload: Workload) -> float:
    """Output tokens per second after the last step that computes a prompt."""
    steps = list(engine.steps(workload))
    last = max(index for index, step in enumerate(steps) if step.prefilled)
    tokens = sum(step.generated for step in steps[last + 1 :])
    return tokens / (steps[-1].end - steps[last].end)


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=6, requests=16, prompt_len=1024, output_len=64)
    add = parser.add_argument
    add("--cases", nargs="+", default=["streaming"], metavar="POLICY", help="default streaming")
    add("--against", default=PLAIN, metavar="POLICY", help=f"default {PLAIN}: plain vLLM")
    add("--budget", type=script.positive, metavar="N", help="default: nobody reaches it")
    script.add_start(parser)
    raise SystemExit(script.run(main, parser))
