"""What spill costs while sequences decode: the same policy with and without it, in turns.

Both engines are in one process (see same_process.py). Every sequence compacts once per page of
tokens; only whole cycles count, in which all sequences decode and each compacts equally often.
Prompts of different lengths spread the compactions over the steps, as in real life.
"""

import argparse
import os
import time
from statistics import median
from typing import Any

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, Workload

CASES = ("streaming", "snapkv", "pyramidal+snapkv", "h2o")


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    for name in args.cases:
        policies = ({"policy": name, "budget": args.budget, "spill": on} for on in (False, True))
        engines = [Engine(settings(args, policy)) for policy in policies]
        for batch in args.batches:
            tokens = prompts(args, batch)
            rounds = [
                [step_ms(args, engine, tokens) for engine in engines] for _ in range(args.rounds)
            ]
            case = {"case": name, "batch": batch}
            for index, prefix in enumerate(("", "cpu_")):
                plain, spill = ([both[on][index] for both in rounds] for on in (False, True))
                costs = [own / other - 1 for own, other in zip(spill, plain, strict=True)]
                case |= {
                    f"baseline_{prefix}step_ms": round(median(plain), 3),
                    f"{prefix}step_ms": round(median(spill), 3),
                    f"{prefix}cost": round(median(costs), 4),
                    f"{prefix}costs": [round(cost, 4) for cost in costs],
                }
            script.emit("spill_cost", args, case)
        for engine in engines:
            engine.close()


def settings(args: argparse.Namespace, policy: dict[str, Any]) -> EngineSettings:
    """An ample pool."""
    longest = args.prompt_len + (args.cycles + 3) * DEFAULT_PAGE_SIZE
    pool_tokens = (max(args.batches) + 1) * longest
    return EngineSettings(
        model=str(args.model),
        pool_bytes=pool_tokens * kv_bytes_per_token(args.model),
        max_model_len=longest,
        policy=policy,
        max_num_seqs=max(args.batches),
        prefix_caching=False,
    )


def prompts(args: argparse.Namespace, batch: int) -> list[list[int]]:
    """What they hold beyond the budget spills when they end."""
    longest = random_prompts(args.model, batch, args.prompt_len + DEFAULT_PAGE_SIZE, args.seed)
    step = max(1, DEFAULT_PAGE_SIZE // batch)
    lengths = (args.prompt_len + index * step % DEFAULT_PAGE_SIZE for index in range(batch))
    return [tokens[:length] for tokens, length in zip(longest, lengths, strict=True)]


def step_ms(
    args: argparse.Namespace, engine: Engine, tokens: list[list[int]]
) -> tuple[float, float]:
    """Mean wall and processor time of the last whole cycles in which all sequences decode."""
    num_steps = args.cycles * DEFAULT_PAGE_SIZE
    ends = []
    for step in engine.steps(Workload(tokens, num_steps + DEFAULT_PAGE_SIZE)):
        if step.generated == len(tokens) and not step.prefilled:
            ends.append((step.end, time.process_time()))
    assert len(ends) > num_steps, f"{len(ends)} pure decode steps, more than {num_steps} expected"
    wall, cpu = (last - first for first, last in zip(ends[-num_steps - 1], ends[-1], strict=True))
    return 1e3 * wall / num_steps, 1e3 * cpu / num_steps


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=5, prompt_len=3072, budget=1024, cycles=2)
    script.add_cases(parser, *CASES, default=("streaming", "snapkv"))
    parser.add_argument(
        "--batches",
        type=script.positive,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="sequences that decode together (default 1 8)",
    )
    raise SystemExit(script.run(main, parser))
