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
                 former; only the reference engine says it
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
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.eval.cases import Case, read_cases
from paged_kv.eval.peer_runs import outcome_of, prompt_of_window, with_peers
from paged_kv.eval.record import Place
from paged_kv.eval.rows import result_row
from paged_kv.eval.running import RunAll, add_common, chosen, evaluate
from paged_kv.eval.task import Outcome, Task, read_windows
from paged_kv.results import Row, standard_error

DEFAULTS = {"prompt": (1024, 512), "stream": (1, 4095)}  # protocol -> (prompt, score) tokens
_FIGURES = ("nll", "nll_se", "ppl", "kl", "kl_se", "vs_first", "vs_first_se")
_COSTS = ("kept", "bytes_per_token", "seconds")
COLUMNS = ("policy", "budget", "page_format", "protocol", *_FIGURES, *_COSTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval perplexity`."""
    add_common(parser)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8")
    add("--protocol", choices=tuple(DEFAULTS), default="prompt", help="default prompt")
    add("--offset", type=int, default=0, metavar="N", help="tokens of the text to skip")
    add("--prompt-tokens", type=positive, metavar="N", help="default 1024 (prompt), 1 (stream)")
    add("--score-tokens", type=positive, metavar="M", help="default 512 (prompt), 4095 (stream)")
    add("--windows", type=positive, default=1, metavar="N", help="places of the text to predict, "
        "the first at the offset; two or more give standard errors (default 1)")  # fmt: skip
    add("--stride", type=positive, metavar="N", help="tokens from one window's first to the "
        "next one's (default: as many as a window needs, so that none overlap)")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs and prints. Raises ValueError, before a model is loaded, for what the user got wrong."""
    model = models.resolve(args.model)
    cases = read_cases(args, model)
    task = make_task(args, model)
    if args.protocol != "prompt" and any(case.is_peer for case in cases):
        raise ValueError(f"protocol {args.protocol}: peers compress prompts only")
    run = with_peers(_engine(args.engine), args.kvpress_python, prompt_of_window, outcome_of)
    stride = args.stride or task.num_tokens
    windows = read_windows(task, args.text, args.offset, args.windows, stride)
    rows = partial(make_rows, args, windows, cases)
    evaluate(args, windows, cases, run, Outcome, rows, COLUMNS, unit="tok")


def make_rows(
    args: argparse.Namespace,
    windows: Sequence[Task],
    cases: Sequence[Case],
    outcomes: dict[Place, Outcome],
) -> list[Row]:
    """A row for each case, over the windows that it has been run in."""
    every = range(len(windows))
    first = dict(chosen(outcomes, every, 0))
    rows = []
    for index, case in enumerate(cases):
        found = chosen(outcomes, every, index)
        if not found:
            continue
        several = [outcome for _, outcome in found]
        nll = [outcome.nll for outcome in several]
        seen = [windows[0].num_seen] * len(found)
        common = args, "perplexity", case, "nll", nll, several, seen
        differences = [one.nll - first[place].nll for place, one in found if place in first]
        rows.append(
            result_row(*common, higher_is_better=False)
            | {"text": args.text.name, "protocol": args.protocol}
            | windows[0].asked(args.stride)
            | _figures(nll, [outcome.kl for outcome in several], differences)
            | {"windows": [_window(windows[place], outcome) for place, outcome in found]}
        )
    return rows


def _figures(
    nll: Sequence[float], kl: Sequence[float | None], differences: Sequence[float]
) -> dict[str, float | None]:
    known = [value for value in kl if value is not None]
    return {
        "nll": round(fmean(nll), 6),
        "nll_se": standard_error(nll),
        "ppl": round(math.exp(fmean(nll)), 4),
        "kl": round(fmean(known), 6) if known else None,
        "kl_se": standard_error(known),
        "vs_first": round(fmean(differences), 6) if differences else None,
        "vs_first_se": standard_error(differences),
    }


def _window(task: Task, outcome: Outcome) -> dict[str, Any]:
    kl = None if outcome.kl is None else round(outcome.kl, 6)
    return {"offset": task.offset, "nll": round(outcome.nll, 6), "kl": kl}


def make_task(args: argparse.Namespace, model: Path) -> Task:
    """What to process and to score, still without the tokens. Raises ValueError."""
    prompt, score = DEFAULTS[args.protocol]
    num_prompt, num_scored = args.prompt_tokens or prompt, args.score_tokens or score
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
    return Task(model, args.protocol, num_prompt, num_scored, args.page_size)


def _engine(name: str) -> RunAll:
    if name == "reference":
        from paged_kv.eval.reference_runs import run_all

        return run_all
    if name == "hf":
        from paged_kv.eval.hf_answers import run_windows

        return run_windows
    from paged_kv.eval import vllm_runs

    vllm_runs.prepare()
    return vllm_runs.run_all
