"""Tasks whose answers are written by the model: from examples to result rows.

A question is hidden, so that a context is compressed before it comes, or seen: then it is part of
what is compressed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from paged_kv.bench.script import positive
from paged_kv.bench.settings import decoder_config
from paged_kv.eval.cases import TRUNCATE, Case, read_cases
from paged_kv.eval.peer_runs import with_peers
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.record import Place
from paged_kv.eval.rows import result_row
from paged_kv.eval.running import RunAll, chosen, evaluate
from paged_kv.eval.tasks.example import Example
from paged_kv.hf.driver.prompts import PromptEncoder
from paged_kv.results import Row

HIDDEN, SEEN = "hidden", "seen"
COLUMNS = ("policy", "budget", "page_format", "task", "score", "standard_error", "samples",
           "kept", "bytes_per_token", "seconds")  # fmt: skip
Score = Callable[[str, Example], float]
More = Callable[[Sequence[Example], Sequence[float]], dict[str, Any]]


def add_asking(parser: argparse.ArgumentParser) -> None:
    """How examples become prompts."""
    add = parser.add_argument
    add("--question", choices=(HIDDEN, SEEN), default=HIDDEN, help="whether the context is "
        "compressed before the question comes, or with it (default hidden; engine vllm "
        "compresses whole prompts: seen)")  # fmt: skip
    add("--max-new-tokens", type=positive, metavar="N",
        help="cuts answers after N tokens, where a task allows more (default: each task's own "
        "limit)")  # fmt: skip


def check_question(args: argparse.Namespace) -> None:
    """Raises ValueError where an engine cannot have what is asked for."""
    if args.engine == "vllm" and args.question == HIDDEN:
        raise ValueError(
            "question hidden: engine vllm compresses a prompt at its end: use --question seen, or "
            "engine reference or hf"
        )


@dataclass
class Asked:
    """Examples as the model gets them.

    Args:
        examples: of one task or several.
        prompts: of each example.
        too_long: tokens of those that do not fit, each with its answer.
    """

    examples: list[Example] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)


def encode(
    args: argparse.Namespace,
    encoder: PromptEncoder,
    examples: Iterable[Example],
    limit: int,
    count: int | None = None,
) -> Asked:
    """Those that fit.

    Args:
        args: of a command with the options of add_asking.
        encoder: of the model.
        examples: all.
        limit: tokens of a prompt and its answer.
        count: most examples; None for all.
    """
    asked = Asked()
    for example in examples:
        if len(asked.prompts) == count:
            break
        texts = example.context, example.question, example.answer_prefix
        context, rest = encoder.parts(*texts, example.chat)
        if args.question == SEEN:
            context, rest = context + rest, []
        most = min(example.max_new_tokens, args.max_new_tokens or example.max_new_tokens)
        prompt = Prompt(context, rest, most, encoder.stop)
        if prompt.num_tokens <= limit:
            asked.examples.append(example)
            asked.prompts.append(prompt)
        else:
            asked.too_long.append(prompt.num_tokens)
    return asked


def fitted(make: Callable[[int], Asked], option: str, length: int, limit: int) -> Asked:
    """Examples of a length, a little shorter where nothing of the model's would be left to answer.

    Args:
        make: examples that leave so many tokens of the length free.
        option: the length's.
        length: most tokens of a text.
        limit: tokens of a prompt and its answer.

    Raises:
        ValueError: the model takes fewer tokens.
    """
    room, asked = 0, make(0)
    while asked.too_long and length <= limit:  # again: a shorter text may be cut otherwise
        room += max(asked.too_long) - limit
        asked = make(room)
    if asked.too_long:
        raise ValueError(
            f"{option} {length}: a prompt and its answer take up to {max(asked.too_long)} tokens; "
            f"the model has {limit}"
        )
    return asked


def in_turns(parts: Sequence[Asked]) -> Asked:
    """One of each part after the other: a run that is stopped has answers to all tasks."""
    pairs = [zip(part.examples, part.prompts, strict=True) for part in parts]
    asked = Asked()
    for several in zip_longest(*pairs):
        for example, prompt in filter(None, several):
            asked.examples.append(example)
            asked.prompts.append(prompt)
    return asked


def limit_of(model: Path, given: int | None) -> int:
    """Tokens that a prompt and its answer may have. Raises ValueError."""
    most = decoder_config(model).get("max_position_embeddings")
    if given and most and given > most:
        raise ValueError(f"max-length must be at most the model's {most}, not {given}")
    return int(given or most or 1 << 30)


def haystack_of(args: argparse.Namespace) -> dict[str, str]:
    """The field of rows that says whose text lies around needles, where it is not ours."""
    return {"haystack": args.haystack.name} if args.haystack else {}


def run_examples(
    args: argparse.Namespace, model: Path, name: str, asked: Asked, more: More = lambda *_: {}
) -> None:
    """Asks, scores, prints.

    Args:
        args: of a command with the common options.
        model: its directory.
        name: of the task, as on the command line.
        asked: what.
        more: fields of a row, from its examples and their scores.
    """
    from paged_kv.eval.tasks.metrics import score  # not at the end: its library may be missing

    cases = read_cases(args, model, baselines=[TRUNCATE])
    engine = with_peers(run_answers(args.engine), args.kvpress_python)
    rows = partial(make_rows, args, name, asked, cases, score, more)
    evaluate(args, asked.prompts, cases, engine, Answer, rows, COLUMNS)


def make_rows(
    args: argparse.Namespace,
    name: str,
    asked: Asked,
    cases: Sequence[Case],
    score: Score,
    more: More,
    outcomes: dict[Place, Answer],
) -> list[Row]:
    """A row for each case and task, over the examples that it has answered; then one for all."""
    encoder = PromptEncoder(cases[0].model)
    rows = []
    for group, places in _groups(name, asked.examples).items():
        for index, case in enumerate(cases):
            found = chosen(outcomes, places, index)
            if not found:
                continue
            examples = [asked.examples[place] for place, _ in found]
            answers = [answer for _, answer in found]
            texts = [encoder.decode(answer.tokens) for answer in answers]
            scores = [score(*pair) for pair in zip(texts, examples, strict=True)]
            seen = [len(asked.prompts[place].context) for place, _ in found]
            metrics = {example.metric for example in examples}
            metric = metrics.pop() if len(metrics) == 1 else "mean"
            row = result_row(args, group, case, metric, scores, answers, seen)
            row |= {"question": args.question, "max_new_tokens": args.max_new_tokens}
            row |= {"context_tokens": round(fmean(seen)), **more(examples, scores)}
            tasks = sorted({example.task for example in examples})
            row["tasks"] = tasks
            if len(tasks) == 1:  # else they are in the rows of these
                row["examples"] = _each(examples, scores, texts)
            rows.append(row)
    return rows


def _groups(name: str, examples: Sequence[Example]) -> dict[str, list[int]]:
    """Places of the examples of each task, and of all where there are several."""
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        task = name if example.task == name else f"{name}:{example.task}"
        groups.setdefault(task, []).append(place)
    if len(groups) != 1:
        groups[name] = list(range(len(examples)))
    return groups


def _each(
    examples: Sequence[Example], scores: Sequence[float], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """What a row is a mean over."""
    return [
        {"id": example.id, "score": round(value, 4), "answer": text}
        for example, value, text in zip(examples, scores, texts, strict=True)
    ]


def run_answers(engine: str) -> RunAll:
    """What asks an engine."""
    if engine == "reference":
        from paged_kv.eval.reference_answers import run_all

        return run_all
    if engine == "hf":
        from paged_kv.eval import hf_answers

        return hf_answers.run_all
    from paged_kv.eval import vllm_answers, vllm_runs

    vllm_runs.prepare()
    return vllm_answers.run_all
