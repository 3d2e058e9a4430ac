"""`paged-kv eval agreement`: does a compressed cache write what the full one writes?

A text is read and compressed, then goes on greedily, in several places of it (--windows). score is
the share of the tokens that are those of the full, native cache; prefix counts the tokens up to the
first other one, after which two texts differ in all that follows; by_position (--json) is the
share by tokens written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from paged_kv import models, registry
from paged_kv.bench.script import positive
from paged_kv.config import CompressionConfig
from paged_kv.eval.answering import run_answers
from paged_kv.eval.cases import Case, read_cases
from paged_kv.eval.peer_runs import with_peers
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.record import Place
from paged_kv.eval.rows import result_row
from paged_kv.eval.running import add_common, chosen, evaluate
from paged_kv.eval.task import Task, read_windows
from paged_kv.results import Row, standard_error

BUCKET = 16  # tokens, of by_position
COLUMNS = ("policy", "budget", "page_format", "score", "standard_error", "prefix", "prefix_se",
           "samples", "kept", "bytes_per_token", "seconds")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval agreement`."""
    add_common(parser)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8")
    add("--offset", type=int, default=0, metavar="N", help="tokens of the text to skip")
    add("--prompt-tokens", type=positive, default=1024, metavar="N", help="default 1024")
    add("--new-tokens", type=positive, default=128, metavar="N", help="default 128")
    add("--windows", type=positive, default=8, metavar="N", help="places of the text (default 8)")


def main(args: argparse.Namespace) -> None:
    """Writes and compares. Raises ValueError before a model is loaded."""
    model = models.resolve(args.model)
    cases = read_cases(args, model)
    whole = Case(registry.FULL, None, CompressionConfig(), model, args.page_size)
    if whole not in cases:  # what others are compared with
        cases = [whole, *cases]
    task = Task(model, "prompt", args.prompt_tokens, args.new_tokens, args.page_size)
    stride = task.num_tokens
    windows = read_windows(task, args.text, args.offset, args.windows, stride, "new-tokens")
    prompts = [
        Prompt(window.tokens[: args.prompt_tokens], max_new_tokens=args.new_tokens)
        for window in windows
    ]
    rows = partial(make_rows, args, cases, cases.index(whole))
    run = with_peers(run_answers(args.engine), args.kvpress_python)
    evaluate(args, prompts, cases, run, Answer, rows, COLUMNS)


def make_rows(
    args: argparse.Namespace, cases: Sequence[Case], whole: int, outcomes: dict[Place, Answer]
) -> list[Row]:
    """A row for each case, over the windows where the full cache's tokens are known, too."""
    every = range(args.windows)
    wanted = {place: answer.tokens for place, answer in chosen(outcomes, every, whole)}
    rows = []
    for index, case in enumerate(cases):
        found = [pair for pair in chosen(outcomes, every, index) if pair[0] in wanted]
        if not found:
            continue
        same = [
            [a == b for a, b in zip(answer.tokens, wanted[place], strict=True)]
            for place, answer in found
        ]
        shares = [fmean(equal) for equal in same]
        prefixes = [[*equal, False].index(False) for equal in same]
        answers = [answer for _, answer in found]
        seen = [args.prompt_tokens] * len(found)
        row = result_row(args, "agreement", case, "agreement", shares, answers, seen)
        rows.append(
            row
            | {"text": args.text.name, "prompt_tokens": args.prompt_tokens}
            | {"new_tokens": args.new_tokens, "offset": args.offset}
            | {"prefix": round(fmean(prefixes), 2)}
            | {"prefix_se": standard_error(prefixes), "by_position": _by_position(same)}
        )
    return rows


def _by_position(same: Sequence[Sequence[bool]]) -> list[dict[str, float]]:
    found = []
    for first in range(0, len(same[0]), BUCKET):
        share = fmean(fmean(equal[first : first + BUCKET]) for equal in same)
        found.append({"position": first, "agreement": round(share, 4)})
    return found
