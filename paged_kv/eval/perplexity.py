"""`paged-kv eval perplexity`: how well a model predicts a text from a compressed cache.

Two protocols:

prompt  the first N tokens (--prompt-tokens) are processed as one chunk and compressed to the budget
        once; the next M (--score-tokens) are predicted from that in one pass, with their true
        positions. The first target is token N + 1, predicted by token N: every prediction is made
        by a token that saw the compressed cache only.
stream  every token is processed by itself while the policy holds the budget from the first one on;
        the M tokens after the first N are predicted.

A window is what one prediction needs of the text; --windows of them, --stride apart, are samples of
it. One line per page format, policy and budget, over all windows:

nll              the mean over the targets of -log p, in nats; ppl is its exponential
kl               the mean of KL(p of the full, native cache || p of this one), in nats: 0 for the
                 former; empty with engine vllm, which gives no whole distributions
vs_first         nll minus that of the first line, window by window
..._se           standard errors of the means over windows, as if those were independent: windows
                 that overlap vary too little. Empty with one window. That of vs_first is paired
                 and mostly far below that of nll: compare policies by it
kept             entries held per layer (mean), right after the compression (prompt) or at the end
                 (stream)
bytes_per_token  the bytes of their keys and values as pages store them, scales and residual
                 included (native: in the dtype that was run), per token seen; side data of a
                 policy is not counted
seconds          processing, compressing and scoring all windows, without loading and without kl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paged_kv import models, registry
from paged_kv.bench.script import positive
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.options import parse_json
from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.core.readers import read_budget
from paged_kv.eval.rows import make_row, print_table
from paged_kv.eval.task import Case, Outcome, Task, check_case, read_windows
from paged_kv.option_table import OPTIONS

DEFAULTS = {"prompt": (1024, 512), "stream": (1, 4095)}  # protocol -> (prompt, score) tokens
FIXED = {  # options that the command line or the protocol decides on -> what to use
    "policy": "--policy",
    "budget": "--budget",
    "compress_prefill": "--protocol",
    "start": "--protocol",
    "page_format": "--page-format",
    "residual_pages": "--residual-pages",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval perplexity`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8")
    add("--policy", required=True, metavar="P[,P...]", help=f"{', '.join(registry.available())}")
    add("--budget", default="256", metavar="B[,B...]", help="entries kept per layer, or with a "
        "point the fraction kept (default 256; ignored by full)")  # fmt: skip
    add("--policy-config", metavar="JSON", help="more options, for all policies given: see "
        "paged-kv options")  # fmt: skip
    add("--page-format", default=NATIVE, metavar="F[,F...]",
        help=f"{', '.join(FORMATS)}, or files of paged-kv calibrate formats "
             "(default native)")  # fmt: skip
    add("--residual-pages", type=int, default=0, metavar="N",
        help=OPTIONS["residual_pages"].describe())  # fmt: skip
    add("--engine", choices=("reference", "vllm"), default="reference", help="default reference")
    add("--protocol", choices=tuple(DEFAULTS), default="prompt", help="default prompt")
    add("--offset", type=int, default=0, metavar="N", help="tokens of the text to skip")
    add("--prompt-tokens", type=positive, metavar="N", help="default 1024 (prompt), 1 (stream)")
    add("--score-tokens", type=positive, metavar="M", help="default 512 (prompt), 4095 (stream)")
    add("--windows", type=positive, default=1, metavar="N", help="places of the text to predict, "
        "the first at the offset; two or more give standard errors (default 1)")  # fmt: skip
    add("--stride", type=positive, metavar="N", help="tokens from one window's first to the "
        "next one's (default: as many as a window needs, so that none overlap)")  # fmt: skip
    add("--page-size", type=positive, default=DEFAULT_PAGE_SIZE, metavar="N",
        help=f"whole pages are evicted (default {DEFAULT_PAGE_SIZE})")  # fmt: skip
    add("--json", action="store_true", help="one JSON object per line instead of a table, "
        "with nll and kl of each window")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs and prints. Raises ValueError, before a model is loaded, for what the user got wrong."""
    cases = read_cases(args)
    task = make_task(args)
    for case in cases:
        check_case(case, task, args.engine)
    run = _engine(args.engine)
    stride = args.stride or task.num_tokens
    windows = read_windows(task, args.text, args.offset, args.windows, stride)
    rows = []
    outcomes: list[list[Outcome]] = [[] for _ in cases]
    with tqdm(unit="tok", file=sys.stderr) as bar:
        for index, outcome in run(windows, cases, bar):
            outcomes[index].append(outcome)
            if len(outcomes[index]) < len(windows):
                continue
            rows.append(make_row(windows, cases[index], outcomes[index], outcomes[0]))
            if args.json:
                bar.clear()
                print(json.dumps(rows[-1]._asdict()), flush=True)
    if not args.json:
        print_table(rows)


def read_cases(args: argparse.Namespace) -> list[Case]:
    """Every page format with every policy and budget; `full` once. Raises ValueError."""
    more = parse_json(args.policy_config, "policy-config") if args.policy_config else {}
    for name in FIXED:
        if name in more:
            raise ValueError(f"policy-config must not have {name}: use {FIXED[name]}")
    cases = []
    budgets = [read_budget("budget", text) for text in args.budget.split(",")]
    for page_format, policy in product(args.page_format.split(","), args.policy.split(",")):
        registry.check(policy)
        paging: dict[str, Any] = {"page_format": page_format}
        if page_format != NATIVE or args.page_format == NATIVE:  # a list may begin with native
            paging["residual_pages"] = args.residual_pages
        if policy == registry.FULL:
            cases.append(Case(policy, None, CompressionConfig.from_dict(paging)))
            continue
        for budget in budgets:
            options = {"policy": policy, "budget": budget, "compress_prefill": True, **paging}
            cases.append(Case(policy, budget, CompressionConfig.from_dict({**more, **options})))
    return cases


def make_task(args: argparse.Namespace) -> Task:
    """What to process and to score, still without the tokens. Raises ValueError."""
    prompt, score = DEFAULTS[args.protocol]
    num_prompt, num_scored = args.prompt_tokens or prompt, args.score_tokens or score
    if args.offset < 0:
        raise ValueError(f"offset must be an integer >= 0, not {args.offset}")
    if args.engine == "vllm" and args.protocol == "prompt" and num_scored + 1 > num_prompt:
        raise ValueError(
            f"score-tokens {num_scored} with prompt-tokens {num_prompt}: engine vllm scores in one "
            "chunk, which is as large as the prompt: score-tokens must be below prompt-tokens"
        )
    if args.engine == "vllm" and args.protocol == "prompt" and args.residual_pages:
        raise ValueError(
            f"residual-pages {args.residual_pages}: engine vllm scores in one chunk, whose tokens "
            "would see the residual of the last one: use --protocol stream"
        )
    if not args.text.is_file():
        raise ValueError(f"text {args.text}: no such file")
    model = models.resolve(args.model)
    return Task(model, args.protocol, num_prompt, num_scored, args.page_size)


def _engine(name: str) -> Callable[[list[Task], list[Case], Any], Iterator[tuple[int, Outcome]]]:
    if name == "reference":
        from paged_kv.eval.reference_runs import run_all

        return run_all
    from paged_kv.eval import vllm_runs

    vllm_runs.prepare()
    return vllm_runs.run_all
