"""`paged-kv eval needle`: is a pass key found in a long text, at each depth and length?

The key stands once in a text of the asked length, after so many percent of it, and is asked for at
the end. score is the share of the keys that the answer has; cells (--json) has found and asked by
length and depth. `truncate` as a policy keeps the first and the last half of the budget of the text
itself: what compression must beat.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.eval.answering import (
    Asked,
    add_asking,
    check_question,
    encode,
    fitted,
    haystack_of,
    limit_of,
    run_examples,
)
from paged_kv.eval.running import add_common
from paged_kv.eval.tasks import needle
from paged_kv.eval.tasks.example import Example
from paged_kv.hf.driver.prompts import PromptEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv eval needle`."""
    add_common(parser)
    add_asking(parser)
    add = parser.add_argument
    add("--lengths", type=positive, nargs="+", default=[4096], metavar="N",
        help="tokens of the texts (default 4096)")  # fmt: skip
    add("--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], metavar="PERCENT",
        help="where the key stands (default 0 25 50 75 100)")  # fmt: skip
    add("--facts", type=positive, default=2, metavar="N",
        help="keys that are asked for at each length and depth (default 2)")  # fmt: skip
    add("--haystack", type=Path, metavar="FILE", help="a text around the key, instead of ours")
    add("--seed", type=int, default=0, metavar="N", help="of the keys (default 0)")


def main(args: argparse.Namespace) -> None:
    """Asks. Raises ValueError, before a model is loaded, for what the user got wrong."""
    check_question(args)
    model = models.resolve(args.model)
    encoder = PromptEncoder(model)
    settings = args.depths, args.facts, args.seed, encoder.count, args.haystack
    limit = limit_of(model, None)

    def make(length: int, room: int) -> Asked:
        return encode(args, encoder, needle.examples([length], *settings, room), limit)

    asked = Asked()
    for length in args.lengths:
        part = fitted(partial(make, length), "lengths", length, limit)
        asked.examples += part.examples
        asked.prompts += part.prompts
    more = {"lengths": args.lengths, "depths": args.depths, "seed": args.seed, **haystack_of(args)}
    run_examples(args, model, "needle", asked, lambda *found: {**more, **cells(*found)})


def cells(examples: Sequence[Example], scores: Sequence[float]) -> dict[str, Any]:
    """found of asked, by length and depth."""
    asked, found = Counter[tuple[Any, Any]](), Counter[tuple[Any, Any]]()
    for example, value in zip(examples, scores, strict=True):
        place = example.info["length"], example.info["depth"]
        asked[place] += 1
        found[place] += int(value == 1)
    return {
        "cells": [
            {"length": length, "depth": depth, "found": found[length, depth], "asked": number}
            for (length, depth), number in sorted(asked.items())
        ]
    }
