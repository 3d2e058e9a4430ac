"""LongBench's questions about long texts, from a folder that the user has.

Its data keep the terms of their sources, so none are here. The folder has LongBench's config/
(dataset2prompt.json, dataset2maxlen.json) and, anywhere below it, files of rows (*.jsonl), of
LongBench or LongBench-E: https://github.com/THUDM/LongBench
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from paged_kv.eval.tasks.example import Example

Token = TypeVar("Token")
Row = dict[str, Any]

# Of each task. Those that need Chinese words cut apart (multifieldqa_zh, dureader, vcsum) are not
# here.
METRIC_OF = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa"), "qa_f1"),
    **dict.fromkeys(("2wikimqa", "musique", "triviaqa"), "qa_f1"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge_l"),
    **dict.fromkeys(("trec", "lsht"), "classification"),
    "passage_count": "count",
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), "retrieval"),
    **dict.fromkeys(("lcc", "repobench-p"), "code_similarity"),
}
TASKS = tuple(METRIC_OF)
# Few-shot tasks and code: a chat template would break off what the model should go on with.
WITHOUT_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
_PROMPTS, _LENGTHS = "config/dataset2prompt.json", "config/dataset2maxlen.json"
_FIELDS = {"input": str, "context": str, "answers": list, "dataset": str, "_id": str}


def examples(folder: Path, task: str, count: int | None, seed: int) -> Iterator[Example]:
    """Rows of a task in an order that the seed gives, each row once.

    The context is the template up to its {context}, with it; the question is the rest.

    Args:
        folder: of LongBench, which the option `data` names.
        task: of TASKS, without the _e of LongBench-E, whose rows count as well.
        count: most examples; None for all. The first ones are the same for any count. There may be
            fewer.
        seed: of the order.

    Raises:
        ValueError: no such task or folder, no rows of the task in it, or rows that are none of
            LongBench's.
    """
    if task not in METRIC_OF:
        raise ValueError(f"task {task!r} must be one of {', '.join(TASKS)}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    template = str(_setting(folder, _PROMPTS, task))
    max_new_tokens = int(_setting(folder, _LENGTHS, task))
    before, found, after = template.partition("{context}")
    if not found or "{input}" in before:
        raise ValueError(
            f"data {folder}: in {_PROMPTS} the template of {task} must have {{context}}, "
            "and {input} only after it"
        )
    rows = sorted(_distinct(_rows(folder, task)), key=lambda row: str(row["_id"]))
    Random(f"{task}-{seed}").shuffle(rows)
    return (
        Example(
            id=f"{task}-{row['_id']}",
            task=task,
            context=before + row["context"],
            question=after.replace("{input}", row["input"]),
            answer_prefix="",
            answers=tuple(row["answers"]),
            max_new_tokens=max_new_tokens,
            metric=METRIC_OF[task],
            chat=task not in WITHOUT_CHAT,
            classes=tuple(row.get("all_classes") or ()),
            info={"dataset": row["dataset"], "words": int(row.get("length") or 0)},
        )
        for row in rows[:count]
    )


def truncated_middle(tokens: list[Token], size: int) -> list[Token]:
    """At most `size` tokens: the first and the last half, as LongBench cuts what is too long."""
    assert size >= 0
    if len(tokens) <= size:
        return tokens
    head = size // 2
    return tokens[:head] + tokens[len(tokens) - (size - head) :]


def _setting(folder: Path, name: str, task: str) -> Any:
    """Of a task, from one of the config files."""
    if not folder.is_dir():
        raise ValueError(f"data {folder}: no such directory")
    file = folder / name
    if not file.is_file():
        raise ValueError(f"data {folder} must have LongBench's {name}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data {folder}: {name} cannot be read: {error}") from None
    if task not in settings:
        raise ValueError(f"data {folder}: {name} has no {task}, only {', '.join(settings)}")
    return settings[task]


def _rows(folder: Path, task: str) -> list[Row]:
    """All of a task, in whatever files of the folder they are."""
    files = sorted(folder.rglob("*.jsonl"))
    rows, others = [], Counter[str]()
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = _row(line, f"data {file}, line {number}")
                    name = row["dataset"].removesuffix("_e")
                    rows += [row] if name == task else []
                    others[name] += 1
    if not rows:
        there = ", ".join(f"{name} ({number})" for name, number in sorted(others.items()))
        raise ValueError(
            f"data {folder} has no rows of {task}: {len(files)} files *.jsonl have "
            f"{there or 'no rows'}"
        )
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    for name, kind in _FIELDS.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(f"{where}: no row of LongBench: {name} must be a {kind.__name__}")
    if not row["answers"]:
        raise ValueError(f"{where}: answers must not be empty")
    return dict(row)


def _distinct(rows: list[Row]) -> Iterator[Row]:
    """Those that no earlier one is like, in _id or in text: collections number rows anew."""
    seen: set[str] = set()
    for row in rows:
        marks = {f"id {row['_id']}", f"text {row['context']}{row['input']}"}
        if not marks & seen:
            yield row
        seen |= marks
