"""Result rows as evaluations and benchmarks write them, without running any."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paged_kv.results import FIELDS

Row = dict[str, Any]
LAYERS = 30
FULL_BYTES = 23040.0
POLICIES = ("pyramidal+snapkv", "snapkv", "streaming")
BUDGETS = (64, 128, 256, 512)


def row(task: str, policy: str, budget: int | float | None, score: float, **more: Any) -> Row:
    """A row with every field; `more` overrides and adds."""
    kept = 2048 if budget is None else budget * 2048 if isinstance(budget, float) else budget
    return {
        **dict.fromkeys(FIELDS),
        "task": task,
        "policy": policy,
        "budget": budget,
        "page_format": "native",
        "engine": "reference",
        "score": score,
        "metric": "accuracy",
        "higher_is_better": True,
        "standard_error": 0.02,
        "samples": 50,
        "kept": kept,
        "bytes_per_token": FULL_BYTES * kept / 2048,
        "seconds": 12.5,
        "model": "SmolLM2-135M-Instruct",
        "model_hash": "0123456789abcdef",
        "versions": {"python": "3.11.2", "torch": "2.9.0", "vllm": "0.32.0"},
        "device": "CPU: two cores",
        "command": f"paged-kv eval {task} --model smollm2 --policy {policy}",
        "date": "2026-11-29",
        **more,
    }


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def realistic(policies: Sequence[str] = POLICIES, budgets: Sequence[int] = BUDGETS) -> list[Row]:
    """All tasks: each policy at each budget, the full cache, speed."""
    rows = list(_quality(policies, budgets))
    rows += [*_throughput(policies), *_latency(policies)]
    for index, policy in enumerate(policies):
        for budget in budgets:
            kept = [round(budget * _tilt(index, layer)) for layer in range(LAYERS)]
            more = {"kept_by_layer": kept, "metric": "megabytes", "engine": "vllm"}
            rows.append(row("memory", policy, budget, budget / 8, **more))
    more = {"metric": "speedup", "engine": "transformers", "length": 800}
    return [*rows, row("cache-speedup", "full", None, 12.4, **more)]


def _tilt(index: int, layer: int) -> float:
    return 1 if index % 3 else 1.6 - 1.2 * layer / (LAYERS - 1)


def _quality(policies: Sequence[str], budgets: Sequence[int]) -> Iterator[Row]:
    nll = {"metric": "nll", "higher_is_better": False, "protocol": "prompt"}
    asked = [("ruler", f"niah_{n}", {}) for n in ("single", "multikey")]
    asked += [("longbench", name, {}) for name in ("trec", "hotpotqa", "qasper", "samsum")]
    asked += [("needle", None, {}), ("perplexity", None, nll), ("agreement", None, {})]
    for task, subtask, more in asked:
        more = more | ({"subtask": subtask} if subtask else {})
        if task != "agreement":
            best = 2.265 if more.get("metric") == "nll" else 0.9
            yield row(task, "full", None, best, **more, **_cells(task, 1.0))
        for index, policy in enumerate(policies):
            for budget in budgets:
                left = 1 - math.exp(-(budget + 40) / (60 + 25 * index))
                score = 2.265 + 0.4 * (1 - left) if more.get("metric") == "nll" else 0.9 * left
                extra = {"by_position": _positions(left)} if task == "agreement" else {}
                yield row(task, policy, budget, score, **more, **extra, **_cells(task, left))


def _cells(task: str, share: float) -> Row:
    if task != "needle":
        return {}
    cells = [
        {"length": length, "depth": depth, "asked": 5,
         "found": max(0, min(5, round(5 * share * (1.1 - length / 9000 - abs(50 - depth) / 900))))}
        for length in (512, 1024, 2048, 4096) for depth in (0, 25, 50, 75, 100)
    ]  # fmt: skip
    return {"cells": cells}


def _positions(left: float) -> list[Row]:
    return [
        {"position": 32 * step, "agreement": round(left ** (1 + step / 4), 3)} for step in range(8)
    ]


def _throughput(policies: Sequence[str]) -> Iterator[Row]:
    more: Row = {"engine": "vllm", "metric": "tokens_per_second", "kept": None, "samples": 3,
                 "standard_error": 4.0, "bytes_per_token": None, "requests": 48,
                 "request_rate": "inf"}  # fmt: skip
    for share in (1.2, 0.8, 0.5, 0.3, 0.2):
        plain = 420 * min(1, 0.35 + share * 0.7)
        for index, case in enumerate(("plain", *policies)):
            budget = None if case == "plain" else 256
            ratio = 1.0 if case == "plain" else 0.9 + 0.15 * (1.2 - share) * (4 - index % 4)
            pool = {"pool_tokens": round(43008 * share), "share": share}
            counts = {"ratio": round(ratio, 3), "running": 30.5, "preemptions": 10 - index % 10}
            speed = round(plain * ratio, 1)
            yield row("throughput", case, budget, speed, **more, **pool, **counts)


def _latency(policies: Sequence[str]) -> Iterator[Row]:
    more: Row = {"engine": "vllm", "metric": "itl_ms", "higher_is_better": False, "kept": None}
    for rate in (0.5, 1.0, 2.0, 4.0):
        for index, case in enumerate(("plain", *policies)):
            budget = None if case == "plain" else 256
            itl = 30 + rate * 22 / (1 + 0.2 * index)
            times = {"ttft_ms": 8 * itl, "ttft_p99_ms": 21 * itl, "itl_ms": itl,
                     "itl_p99_ms": 2.4 * itl, "request_rate": rate}  # fmt: skip
            yield row("latency", case, budget, itl, **more, **times)
