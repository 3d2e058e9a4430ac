"""Prompts of different lengths in transformers: generate_batch against left-padded generate().

Both get the same prompts in one call and make as many new tokens, greedily. Cases are policies;
`full` keeps everything. Lengths are drawn evenly between --shortest and --longest.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from paged_kv.bench import script
from paged_kv.bench.settings import random_prompts
from paged_kv.hf import generate_batch
from paged_kv.hf.driver.loading import load_model

PAD = 0
PLAIN = "padded"
Prompts = list[list[int]]
Run = Callable[[Prompts], None]
Times = tuple[float, float]


def main(args: argparse.Namespace) -> None:
    if args.shortest > args.longest:
        raise ValueError(f"--shortest {args.shortest} is more than --longest {args.longest}")
    torch.set_grad_enabled(False)
    model = load_model(args.model).to(getattr(torch, args.dtype))
    runs: dict[str, Run] = {PLAIN: partial(padded, model, args)}
    runs |= {case: partial(batched, model, args, case) for case in args.cases}
    for run in runs.values():  # warms up
        run(ragged_prompts(args, args.seed - 1)[:2])
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for round_ in range(args.rounds):
        prompts = ragged_prompts(args, args.seed + round_)
        for name, run in runs.items():
            times[name].append(timed(run, prompts))
            print(f"round {round_ + 1}: {name} {times[name][-1]}", file=sys.stderr)
    for case in args.cases:
        script.emit("hf_batch", args, {"case": case, **compared(times[case], times[PLAIN], args)})


def timed(run: Run, prompts: Prompts) -> Times:
    """Seconds, and seconds of processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    run(prompts)
    return time.perf_counter() - start, time.process_time() - cpu


def compared(own: list[Times], plain: list[Times], args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a line."""
    pairs = list(zip(own, plain, strict=True))
    ratios = [other / seconds for (seconds, _), (other, _) in pairs]
    new_tokens = args.requests * args.output_len
    return {
        "tokens_per_second": round(new_tokens / median(seconds for seconds, _ in own), 1),
        "baseline_tokens_per_second": round(
            new_tokens / median(seconds for seconds, _ in plain), 1
        ),
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "cpu_ratio": round(median(other / seconds for (_, seconds), (_, other) in pairs), 4),
    }


def ragged_prompts(args: argparse.Namespace, seed: int) -> Prompts:
    """Token ids without meaning."""
    generator = random.Random(seed)
    prompts = random_prompts(args.model, args.requests, args.longest, seed)
    return [prompt[: generator.randint(args.shortest, args.longest)] for prompt in prompts]


def padded(model: Any, args: argparse.Namespace, prompts: Prompts) -> None:
    """generate() of transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generate(ids, attention_mask=mask, pad_token_id=PAD, **common(args))


def batched(model: Any, args: argparse.Namespace, policy: str, prompts: Prompts) -> None:
    """generate_batch of paged_kv."""
    own = {} if policy == "full" else {"budget": args.budget}
    generate_batch(model, prompts, policy=policy, progress_bar=False, **own, **common(args))


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Options that both get."""
    return {"max_new_tokens": args.output_len, "eos_token_id": None, "do_sample": False}


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=5, requests=32, output_len=96, budget=128)
    for name, default in (("shortest", 16), ("longest", 400)):
        parser.add_argument(
            f"--{name}",
            type=script.positive,
            default=default,
            metavar="N",
            help=f"tokens of the {name} possible prompt (default {default})",
        )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    script.add_cases(
        parser,
        "full",
        "streaming",
        "pyramidal+streaming",
        "snapkv",
        "h2o",
        default=["full", "streaming"],
    )
    raise SystemExit(script.run(main, parser))
