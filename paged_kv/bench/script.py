"""What the scripts in benchmarks/ share: their arguments, their output, their errors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paged_kv import models
from paged_kv.bench import compare
from paged_kv.bench.settings import AUTO, kv_bytes_per_token, random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE, PRESSURE
from paged_kv.model_rules import DTYPE_BYTES
from paged_kv.option_table import OPTIONS
from paged_kv.vllm.driver.workload import EngineSettings, Workload

Json = dict[str, Any]
PLAIN = "plain"
ALWAYS = OPTIONS["start"].default

_HELP = {
    "rounds": "times that every engine runs the workload; medians are over these",
    "requests": "requests that arrive at once",
    "prompt_len": "tokens of a prompt",
    "output_len": "tokens generated for each request",
    "pool_tokens": "tokens whose keys and values fit into the pool, uncompressed",
    "budget": "entries kept per sequence and layer",
    "max_len": "tokens of the longest sequence",
    "waves": "batches of requests in a round",
    "prefix_len": "tokens that all prompts of a round begin with",
    "suffix_len": "tokens of a prompt after that",
    "preempt_every": "steps after which all running requests are preempted",
    "minutes": "how long the load lasts, all cases together",
    "cycles": "times that every sequence compacts while it is measured",
}


def make_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """A parser with --model, --seed and an integer option for each default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="smollm2 (the default), a directory or a hub name"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default 0)")
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        help_ = f"{_HELP[name]} (default {default})"
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=help_)
    return parser


def add_cases(
    parser: argparse.ArgumentParser, *cases: str, default: Sequence[str] | None = None
) -> None:
    """--cases: which of the script's cases to measure."""
    chosen = list(cases if default is None else default)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=cases,
        default=chosen,
        metavar="CASE",
        help=f"of {', '.join(cases)} (default {' '.join(chosen)})",
    )


def add_start(parser: argparse.ArgumentParser) -> None:
    """--start: when the policies' sequences are held to their budgets."""
    choices = (ALWAYS, PRESSURE)
    parser.add_argument(
        "--start", choices=choices, default=ALWAYS, help=f"{OPTIONS['start'].help} (default always)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype: in which vLLM runs the model; see settings.resolved_dtype."""
    parser.add_argument(
        "--dtype",
        choices=(AUTO, *DTYPE_BYTES),
        default=AUTO,
        help="in which the model runs (default auto: bfloat16, on older GPUs float16, on "
        "processors without AVX-512 float32)",
    )


def positive(text: str) -> int:
    """For argparse: an integer above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, not {text!r}")
    return int(text)


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses, resolves the model and runs; a user's mistake is one line and exit code 2."""
    args = parser.parse_args(argv)
    try:
        args.model = models.resolve(args.model)
        main(args)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def emit(benchmark: str, args: argparse.Namespace, case: Json) -> None:
    """One line of JSON: the case's results, and the settings that led to them."""
    print(json.dumps({"benchmark": benchmark, **case, "settings": as_json(args)}), flush=True)


def as_json(args: argparse.Namespace) -> Json:
    """The arguments as values that JSON can carry."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if not callable(value)
    }


def engine_settings(
    args: argparse.Namespace,
    pool_tokens: int,
    policy: Mapping[str, Any] | None = None,
    block_size: int | None = DEFAULT_PAGE_SIZE,
) -> EngineSettings:
    """An engine for requests of args.prompt_len + args.output_len tokens."""
    needed = args.prompt_len + args.output_len
    return EngineSettings(
        model=str(args.model),
        pool_bytes=pool_tokens * kv_bytes_per_token(args.model),
        max_model_len=-(-needed // DEFAULT_PAGE_SIZE) * DEFAULT_PAGE_SIZE,
        policy=policy or {},
        block_size=block_size,
        max_num_seqs=args.requests,
    )


def workload(args: argparse.Namespace, seed: int) -> Workload:
    """args.requests random prompts; another seed gives others."""
    prompts = random_prompts(args.model, args.requests, args.prompt_len, args.seed + seed)
    return Workload(prompts, args.output_len)


def warm_up(args: argparse.Namespace) -> Workload:
    """A short first run."""
    prompts = random_prompts(args.model, min(4, args.requests), args.prompt_len, args.seed - 1)
    return Workload(prompts, min(8, args.output_len))


def against_plain(
    args: argparse.Namespace, pool_tokens: int, rounds: Sequence[Sequence[Workload]]
) -> dict[str, compare.Series]:
    """Runs plain vLLM and the policies in args.cases, with args.budget, in pools of one size."""
    start = getattr(args, "start", ALWAYS)
    policies: dict[str, Json] = {
        name: {"policy": name, "budget": args.budget, "start": start} for name in args.cases
    }
    settings = {
        name: engine_settings(args, pool_tokens, policy)
        for name, policy in {PLAIN: {}, **policies}.items()
    }
    with compare.running(settings, warm_up(args)) as engines:
        return compare.interleave(engines, rounds)


def independent_rounds(args: argparse.Namespace) -> list[list[Workload]]:
    """args.rounds rounds of one workload each."""
    return [[workload(args, seed)] for seed in range(args.rounds)]
