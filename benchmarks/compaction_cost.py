"""The share of a decode step that paged_kv's own work takes.

shift is what each step pays for reading compressed sequences, compact what moving the survivors
costs; both averaged over whole cycles of page_size steps, in which every sequence compacts once in
every layer group. Prompts of different lengths spread the events over the steps, as in real life.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, Workload


class Stopwatch:
    """Adds up the time spent in a method of some objects."""

    def __init__(self, targets: Iterable[Any], method: str) -> None:
        self.seconds = 0.0
        self.calls = 0
        for target in targets:
            setattr(target, method, partial(self.timed, getattr(target, method)))

    def timed(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the method gives."""
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1


def watch(worker: Any) -> dict[str, Stopwatch]:
    """The parts of a worker's steps, by name."""
    groups = chain.from_iterable(worker.model_runner.attn_groups)
    builders = chain.from_iterable(group.metadata_builders for group in groups)
    return {
        "shift": Stopwatch(builders, "retained"),
        "compact": Stopwatch([worker.compactor], "_compact"),
    }


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    for policy in args.cases:
        for budget in args.budgets:
            engine = Engine(engine_settings(args, policy, budget))
            watches = watch(engine.core.model_executor.driver_worker.worker)
            for batch in args.batches:
                case = {"case": policy, "budget": budget, "batch": batch}
                measured = measure(args, engine, watches, prompts(args, budget, batch))
                script.emit("compaction_cost", args, {**case, **measured})
            engine.close()


def engine_settings(args: argparse.Namespace, policy: str, budget: int) -> EngineSettings:
    """An ample pool."""
    longest = 2 * budget + (args.cycles + 2) * DEFAULT_PAGE_SIZE
    pool_tokens = (max(args.batches) + 1) * longest
    return EngineSettings(
        model=str(args.model),
        pool_bytes=pool_tokens * kv_bytes_per_token(args.model),
        max_model_len=longest,
        policy={"policy": policy, "budget": budget},
        max_num_seqs=max(args.batches),
    )


def prompts(args: argparse.Namespace, budget: int, batch: int) -> list[list[int]]:
    """Beyond every step's budget, so that all sequences compact once per page."""
    longest = random_prompts(args.model, batch, 2 * budget + DEFAULT_PAGE_SIZE, args.seed)
    return [
        tokens[: 2 * budget + index % DEFAULT_PAGE_SIZE] for index, tokens in enumerate(longest)
    ]


def measure(
    args: argparse.Namespace,
    engine: Engine,
    watches: dict[str, Stopwatch],
    tokens: list[list[int]],
) -> dict[str, Any]:
    """Shares of the last whole cycles in which all sequences decode."""
    num_steps = args.cycles * DEFAULT_PAGE_SIZE
    rows = []
    before = None
    for step in engine.steps(Workload(tokens, num_steps + DEFAULT_PAGE_SIZE // 2)):
        now = {part: (watch.seconds, watch.calls) for part, watch in watches.items()}
        if step.generated == len(tokens) and not step.prefilled:
            rows.append((before, (step.end, now)))
        before = step.end, now
    rows = rows[-num_steps:]
    assert len(rows) == num_steps, f"{len(rows)} pure decode steps, {num_steps} expected"
    seconds = sum(after[0] - before[0] for before, after in rows)
    result = {"step_ms": round(1e3 * seconds / num_steps, 3)}
    total = 0.0
    for part in watches:
        spent = sum(after[1][part][0] - before[1][part][0] for before, after in rows)
        calls = sum(after[1][part][1] - before[1][part][1] for before, after in rows)
        assert calls, f"nobody called what {part} watches"
        total += spent
        result[f"{part}_share"] = round(spent / seconds, 5)
        result[f"{part}_calls_per_step"] = round(calls / num_steps, 3)
        result[f"{part}_us_per_call"] = round(1e6 * spent / calls, 1)
    return {**result, "share": round(total / seconds, 5)}


if __name__ == "__main__":
    parser = script.make_parser(__doc__, cycles=4)
    chosen = "streaming", "pyramidal+streaming", "pyramidal"
    others = "calibrated_attention", "snapkv", "past_future", "knorm", "random"
    script.add_cases(parser, *chosen, *others, default=chosen)
    for name, default in {"budgets": [256, 1024], "batches": [1, 8, 48]}.items():
        parser.add_argument(
            f"--{name}",
            type=script.positive,
            nargs="+",
            default=default,
            metavar="N",
            help=f"default {' '.join(map(str, default))}",
        )
    raise SystemExit(script.run(main, parser))
