"""`paged-kv eval ruler`: what a model can still find in and gather from a long text.

RULER's synthetic tasks (arXiv 2404.06654), of any length (cwe up to 16k): needles among noise,
sentences or other needles (niah_*), chains of variables (vt), common and frequent words (cwe, fwe).
score is the share of what is asked for that the answer has. A row for each task, and one, `ruler`,
for all of them.
`truncate` as a policy keeps the first and the last half of the budget of the text itself.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.eval.answering import (
    Asked,
    add_asking,
    check_question,
    encode,
    fitted,
    haystack_of,
    in_turns,
    limit_of,
    run_examples,
)
from paged_kv.eval.running import add_common
from paged_kv.eval.tasks import ruler
from paged_kv.hf.driver.prompts import PromptEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval ruler`."""
    add_common(parser)
    add_asking(parser)
    add = parser.add_argument
    add("--tasks", default=",".join(ruler.TASKS), metavar="T[,T...]",
        help="default: all, %(default)s")  # fmt: skip
    add("--length", type=positive, default=4096, metavar="N",
        help="tokens of a text and its question (default 4096)")  # fmt: skip
    add("--examples", type=positive, default=20, metavar="N", help="of each task (default 20)")
    add("--haystack", type=Path, metavar="FILE",
        help="a text around the needles of the tasks with sentences, instead of ours")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the texts (default 0)")


def main(args: argparse.Namespace) -> None:
    """Asks. Raises ValueError, before a model is loaded, for what the user got wrong."""
    check_question(args)
    model = models.resolve(args.model)
    encoder = PromptEncoder(model)
    settings = args.length, args.examples, args.seed, encoder.count, args.haystack
    limit = limit_of(model, None)

    def make(task: str, room: int) -> Asked:
        return encode(args, encoder, ruler.examples(task, *settings, room), limit)

    tasks = args.tasks.split(",")
    parts = [fitted(partial(make, task), "length", args.length, limit) for task in tasks]
    more = {"length": args.length, "seed": args.seed, **haystack_of(args)}
    run_examples(args, model, "ruler", in_turns(parts), lambda *_: more)
