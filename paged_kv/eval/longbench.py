"""`paged-kv eval longbench`: questions about real texts, scored as LongBench scores them.

Reads LongBench's own files (arXiv 2308.14508) from a folder, --data: its config/ and rows of any of
its tasks in *.jsonl, which may not be passed on. Examples that do not fit the model are left out. A
row for each task, and one, `longbench`, for all of them. `truncate` as a policy keeps the first and
the last half of the budget of the text itself, as LongBench does with what is too long.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.eval.answering import (
    add_asking,
    check_question,
    encode,
    in_turns,
    limit_of,
    run_examples,
)
from paged_kv.eval.running import add_common
from paged_kv.eval.tasks import longbench
from paged_kv.hf.driver.prompts import PromptEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval longbench`."""
    add_common(parser)
    add_asking(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="LongBench: config/ and *.jsonl")
    add("--tasks", required=True, metavar="T[,T...]", help=f"of {', '.join(longbench.TASKS)}")
    add("--examples", type=positive, default=50, metavar="N",
        help="of each task that fit; fewer where there are fewer (default 50)")  # fmt: skip
    add("--max-length", type=positive, metavar="N",
        help="most tokens of a prompt and its answer (default: what the model can)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="which examples (default 0)")


def main(args: argparse.Namespace) -> None:
    """Asks. Raises ValueError, before a model is loaded, for what the user got wrong."""
    check_question(args)
    model = models.resolve(args.model)
    encoder, limit = PromptEncoder(model), limit_of(model, args.max_length)
    parts = []
    for task in args.tasks.split(","):
        examples = longbench.examples(args.data, task, None, args.seed)
        part = encode(args, encoder, examples, limit, args.examples)
        if not part.prompts:
            raise ValueError(
                f"max-length {limit}: no example of {task} fits: the shortest takes "
                f"{min(part.too_long)} tokens"
            )
        parts.append(part)
    if num_left_out := sum(len(part.too_long) for part in parts):
        print(f"{num_left_out} examples are longer than {limit} tokens: left out", file=sys.stderr)
    more = {"seed": args.seed, "max_length": args.max_length}
    run_examples(args, model, "longbench", in_turns(parts), lambda *_: more)
