"""Which rows count, what their curves are called, and which belong into one plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from paged_kv.core.page_formats import NATIVE
from paged_kv.option_table import OPTIONS
from paged_kv.registry import FULL
from paged_kv.results import OF_ALL, Row

# Speed and memory have sections of their own; every other task is quality.
THROUGHPUT, LATENCY, MEMORY, NEEDLE = "throughput", "latency", "memory", "needle"
ALWAYS = OPTIONS["start"].default
SPEED = (THROUGHPUT, LATENCY, MEMORY, "cache-speedup")
ORDER = ("perplexity", "agreement", NEEDLE, "ruler", "longbench")  # then others, then SPEED
# Fields that tasks add and that say what was asked: rows that differ in them are in plots apart.
FOR_ALL = tuple(OF_ALL)
LOAD = ("requests", "input_len", "output_len", "dtype", *FOR_ALL)
SETTINGS = {THROUGHPUT: ("request_rate", *LOAD), LATENCY: ("share", *LOAD),
            MEMORY: (*LOAD, "length")}  # fmt: skip
QUALITY = ("subtask", "text", "question", "protocol", "length", "max_new_tokens",
           "prompt_tokens", "score_tokens", "new_tokens", "lengths", "depths", "tasks", "haystack",
           "offset", "stride", "seed", "max_length", *FOR_ALL)  # fmt: skip
# Of these, what a plot's name says only where rows differ in it.
SELDOM = {"request_rate", "lengths", "depths", "tasks", "haystack", "offset", "stride", "seed",
          "max_length", "dtype"}  # fmt: skip
# What the curves of a plot differ in, or run over.
SERIES = ("policy", "budget", "page_format", "engine", "start", "case", "pool_tokens", "share",
          "request_rate")  # fmt: skip
NAMES = {"input_len": "input", "output_len": "output", "share": "pool"}
PLACE = ("model", "model_hash", "device")


class Replaced(NamedTuple):
    """A row that does not count because a later one makes the same claim."""

    row: Row
    by: Row


class Group(NamedTuple):
    """The rows of one plot."""

    place: str  # the model, with what else tells its rows from those of another
    task: str
    metric: str
    setting: str  # what settings() says of these rows, as text; "" if there is nothing
    rows: list[Row]

    @property
    def subtask(self) -> str:
        """Of what the task is a mean over; "" for the mean, and for a task that has none."""
        return str(self.rows[0].get("subtask") or "")

    @property
    def name(self) -> str:
        """Of what was measured, without the model."""
        parts = (self.task, self.setting, self.metric if self.metric != self.task else "")
        return ", ".join(part for part in parts if part)

    @property
    def title(self) -> str:
        return f"{self.name} · {self.place}"


def latest(rows: Iterable[Row]) -> tuple[list[Row], list[Replaced]]:
    """The last row of each claim, by date and then by place in the files; and those before it."""
    kept: dict[tuple[str, ...], Row] = {}
    replaced = []
    for row in sorted(rows, key=lambda row: str(row.get("date") or "")):
        names = ("task", "metric", *PLACE, *SERIES, *settings(row))
        claim = tuple(repr(row.get(name)) for name in names)
        if claim in kept:
            replaced.append((claim, kept.pop(claim)))
        kept[claim] = row
    return list(kept.values()), [Replaced(row, kept[claim]) for claim, row in replaced]


def settings(row: Row) -> tuple[str, ...]:
    """The fields that say what was asked, in a row of this task."""
    task = row["task"]
    return SETTINGS.get(task, ("length", "dtype") if task in SPEED else QUALITY)


def number(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def budget_text(budget: Any) -> str:
    """256 entries, or 25 % of them; "" for what keeps everything."""
    if budget is None:
        return ""
    return f"{100 * budget:g} %" if isinstance(budget, float) else f"{budget:,}"


def budget_order(budget: Any) -> tuple[int, float]:
    """What keeps everything first, then shares, then counts."""
    return (0, 0) if budget is None else (1 if isinstance(budget, float) else 2, budget)


def named(rows: Sequence[Row]) -> list[Row]:
    """Copies with `place` (of the measurement) and `label` (of its curve).

    A task with a colon is split into task and subtask.
    Both say no more than it takes to tell rows apart: a place is the model's name, with its hash
    and the device where those differ; a label the policy, with the page format unless native, the
    start unless always, and the engine where one task ran it on several. Curves of speed do not run
    over budgets: there a label has the budget, too, where there are several.
    """
    hashes, devices, engines, budgets = (defaultdict(set) for _ in range(4))
    for row in rows:
        hashes[row.get("model")].add(row.get("model_hash"))
        devices[row.get("model")].add(row.get("device"))
        key = (row["task"], _series(row))
        engines[key].add(row["engine"])
        budgets[key].add(row["budget"])
    copies = []
    for row in rows:
        model = row.get("model")
        place = [str(model or "unknown model")]
        place += [str(row.get("model_hash"))[:8]] * (len(hashes[model]) > 1)
        place += [str(row.get("device"))] * (len(devices[model]) > 1)
        key = (row["task"], _series(row))
        label = [_series(row)]
        if row["task"] in (THROUGHPUT, LATENCY) and len(budgets[key]) > 1:
            label.append(budget_text(row["budget"]) or "no budget")
        label += [str(row["engine"])] * (len(engines[key]) > 1)
        task, _, subtask = row["task"].partition(":")
        named = {"task": task, **({"subtask": subtask} if subtask else {})}
        copies.append({**row, **named, "place": " · ".join(place), "label": " · ".join(label)})
    return copies


def _series(row: Row) -> str:
    name = row["case"] if row["task"] in SPEED and row.get("case") else row["policy"]
    parts = [str(name)]
    parts += [str(row["page_format"])] * (row["page_format"] not in (NATIVE, None))
    parts += [str(row.get("start"))] * (row.get("start") not in (ALWAYS, None))
    return " · ".join(parts)


def labels(rows: Iterable[Row]) -> list[str]:
    """Of all curves, in the order that decides on colors: by name, what keeps everything first."""
    found = {row["label"]: row["budget"] is not None for row in rows}
    return sorted(found, key=lambda label: (found[label], label.lower(), label))


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by place, task, metric and settings, in a stable order."""
    rows = list(rows)
    varied = _varied(rows)
    found = defaultdict(list)
    for row in rows:
        names = [name for name in settings(row) if row.get(name) is not None]
        shown = [name for name in names if name not in SELDOM or (_kind(row), name) in varied]
        setting = ", ".join(_setting(name, row[name]) for name in shown)
        found[row["place"], row["task"], row["metric"], setting].append(row)
    listed = [Group(*key, rows) for key, rows in found.items()]
    return sorted(listed, key=lambda group: (group.place, task_order(group.task), *group[2:4]))


def _varied(rows: Sequence[Row]) -> set[tuple[Any, str]]:
    """(kind, name) of the fields of SELDOM in which rows of a kind differ."""
    values = defaultdict(set)
    for row in rows:
        for name in SELDOM.intersection(settings(row)):
            values[_kind(row), name].add(repr(row.get(name)))
    return {key for key, several in values.items() if len(several) > 1}


def _kind(row: Row) -> tuple[Any, ...]:
    """Of what was measured."""
    return row["place"], row["task"], row.get("subtask"), row["metric"], row.get("text")


def _setting(name: str, value: Any) -> str:
    if name in ("subtask", "protocol"):  # names that speak for themselves
        return str(value)
    if isinstance(value, dict):
        return options_text(value)
    text = f"{value:,}" if isinstance(value, (int, float)) else str(value)
    if isinstance(value, list):
        text = " ".join(map(str, value))
    return f"{NAMES.get(name, name.replace('_', ' '))} {text}"


def options_text(options: dict[str, Any]) -> str:
    """Of policies."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def task_order(task: str) -> tuple[int, str]:
    """Known tasks first, speed last."""
    known = [*ORDER, None, *SPEED]
    return known.index(task if task in known else None), task


def curves(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by label, in the order of labels()."""
    rows = list(rows)
    found: dict[str, list[Row]] = {label: [] for label in labels(rows)}
    for row in rows:
        found[row["label"]].append(row)
    return found


def is_full(row: Row) -> bool:
    """Whether it is the cache that quality is compared with: everything kept, as it is."""
    return row["policy"] == FULL and row["page_format"] in (NATIVE, None)
