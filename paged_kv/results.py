"""Result rows: what `paged-kv eval` and `bench` write, one JSON object a line, and `report` reads.

Every row has the fields of FIELDS, then those of OF_ALL and of its task. A row is a claim, and
carries what it takes to make it again.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import stdev
from typing import Any

from paged_kv.model_identity import identity

Row = dict[str, Any]

FIELDS = {
    "task": "what was measured, as on the command line",
    "policy": "a policy, with options of its own after colons, or the name of a peer",
    "budget": "entries or share kept; null for what keeps everything",
    "page_format": "of the pages",
    "engine": "what ran the model",
    "score": "of the task; see metric",
    "metric": "what the score is: accuracy, f1, nll, tokens_per_second, ...",
    "higher_is_better": "which way the score goes",
    "standard_error": "of the score; null with one sample",
    "samples": "what the score is a mean over",
    "kept": "entries held per layer, mean; null if the engine does not say",
    "bytes_per_token": "of keys and values as pages store them, per token of context",
    "seconds": "of all samples, without loading",
}
OF_ALL = {  # policies of a run; where it is not the default
    "page_size": "entries are dropped in multiples of it",
    "residual_pages": "newest pages that stay in the model's dtype",
    "policy_config": "further options, an object",
}
PROVENANCE = {
    "model": "the directory's name",
    "model_hash": "of its config and samples of its weights",
    "versions": "of python, paged_kv, torch, transformers and vllm, as far as installed",
    "device": "the processor or GPU that ran the model",
    "command": "the command line",
    "date": "when it ran",
}
_PACKAGES = ("torch", "transformers", "vllm")
VLLM = "vllm"


def provenance(model: Path, argv: Sequence[str] | None = None, engine: str = VLLM) -> Row:
    """The fields of PROVENANCE for what runs in this process now.

    Args:
        model: a model directory.
        argv: the command line; None for this process's.
        engine: what runs the model.
    """
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if argv is None else list(argv)
    if "--out" in words:  # where it went is not what was claimed
        place = words.index("--out")
        del words[place : place + 2]
    return {
        "model": model.name,
        "model_hash": identity(model),
        "versions": versions(),
        "device": device(engine),
        "command": shlex.join(words),
        "date": date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    from paged_kv import __version__

    found = {"python": platform.python_version(), "paged_kv": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device(engine: str = VLLM) -> str:
    """What runs the model: vLLM takes the GPU that torch sees; all others are on the processor."""
    torch = sys.modules.get("torch")
    if engine == VLLM and torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        names = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = None
    return f"CPU: {names.group(1).strip() if names else platform.processor() or 'unknown'}"


def append(path: Path, row: Row) -> None:
    """One more line. Raises ValueError if a field of FIELDS is missing."""
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise ValueError(f"a result row must have {', '.join(missing)}")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of files, in order; later rows of the same claim do not replace earlier ones.

    Raises:
        ValueError: names the file and line of what is no result row.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"results {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_row(line, f"results {path}:{number}"))
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or any(name not in row for name in FIELDS):
        raise ValueError(f"{where}: not a result row: it must have {', '.join(FIELDS)}")
    return row


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, rounded; None of fewer than two."""
    if len(values) < 2:
        return None
    return round(stdev(values) / math.sqrt(len(values)), 6)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Names to the left, numbers to the right, nothing where a number is not known."""
    shown = [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    lines = [list(columns), *shown]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{line[0]:{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells), flush=True)
