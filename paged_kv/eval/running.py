"""What all evaluations do: their common options, progress, resuming, writing the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from paged_kv import registry, results
from paged_kv.bench.script import positive
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.eval.cases import Case
from paged_kv.eval.peers import peers
from paged_kv.eval.record import Place, Record
from paged_kv.option_table import OPTIONS
from paged_kv.variants import SHARED, SYNTAX

Outcome = TypeVar("Outcome", bound=NamedTuple)
Todo = Callable[[int, int], bool]  # of a sample and a case
ENGINES = ("reference", "hf", "vllm")


class RunAll(Protocol):
    """Runs cases on samples, in an order of its own."""

    def __call__(
        self, samples: Sequence[Any], cases: Sequence[Case], todo: Todo, bar: Any, /
    ) -> Iterator[tuple[int, int, Any]]:
        """(index of a sample, index of a case, outcome) of those that are wanted.

        Args:
            samples: what is asked; at least one.
            cases: what is compared, all of one model.
            todo: whether this case is wanted on this sample.
            bar: tqdm, whose total is not known yet.
        """


def add_common(parser: argparse.ArgumentParser) -> None:
    """What is compared, and where the results go."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--policy", required=True, metavar=SYNTAX, help=f"{', '.join(registry.available())}; "
        f"peers: {', '.join(peers.NAMES)}")  # fmt: skip
    add("--budget", default="256", metavar="B[,B...]", help="entries kept per layer, or with a "
        "point the fraction kept (default 256; ignored by full)")  # fmt: skip
    add("--policy-config", metavar="JSON", help=SHARED)
    add("--page-format", default=NATIVE, metavar="F[,F...]",
        help=f"{', '.join(FORMATS)}, or files of paged-kv calibrate formats "
             "(default native)")  # fmt: skip
    add("--residual-pages", type=int, default=0, metavar="N",
        help=OPTIONS["residual_pages"].describe())  # fmt: skip
    add("--engine", choices=ENGINES, default=ENGINES[0], help="default reference")
    add("--page-size", type=positive, default=DEFAULT_PAGE_SIZE, metavar="N",
        help=f"whole pages are evicted (default {DEFAULT_PAGE_SIZE})")  # fmt: skip
    add("--kvpress-python", metavar="FILE", help="interpreter of an environment with kvpress, for "
        "kvpress:... (default: that of `make peers`)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object per line instead of a table")
    add("--out", type=Path, metavar="FILE", help="add these lines to a file, too; what is done "
        "lies in FILE.partial until then, and the same command goes on with it")  # fmt: skip


def evaluate(
    args: argparse.Namespace,
    samples: Sequence[Any],
    cases: Sequence[Case],
    run_all: RunAll,
    kind: Callable[..., Outcome],
    make_rows: Callable[[dict[Place, Outcome]], list[results.Row]],
    columns: Sequence[str],
    unit: str = "answer",
) -> None:
    """Runs what is not done yet; prints and writes the rows of what is done.

    Args:
        args: of a command with the common options.
        samples: what is asked, NamedTuples or dataclasses.
        cases: what is compared.
        run_all: yields (index of a sample, index of a case, outcome), of those that are wanted.
        kind: of an outcome.
        make_rows: of the outcomes, which are not all after Ctrl-C.
        columns: of the table.
        unit: what the progress bar counts.
    """
    record = Record(args.out, args.engine, [*map(_plain, samples)], cases, kind)
    stopped = False
    with tqdm(unit=unit, file=sys.stderr) as bar:
        try:
            for sample, case, outcome in run_all(samples, cases, record.todo, bar):
                record.add(sample, case, outcome)
        except KeyboardInterrupt:
            stopped = True
    publish(args, make_rows(record.outcomes), columns, None if stopped else args.out)
    record.close(is_complete=not stopped)
    if stopped:
        total = len(samples) * len(cases)
        more = f"; the same command goes on from {record.path}" if args.out else ""
        print(f"stopped: {len(record.outcomes)} of {total} are done{more}", file=sys.stderr)
        raise KeyboardInterrupt


def _plain(sample: Any) -> Any:
    """As JSON can carry it."""
    if isinstance(sample, tuple):
        return sample
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(sample).items()}


def publish(
    args: argparse.Namespace,
    rows: Sequence[results.Row],
    columns: Sequence[str],
    out: Path | None,
) -> None:
    """Prints the rows as the user wants them; adds them to a file."""
    if not rows:
        return
    from paged_kv import models

    origin = results.provenance(models.resolve(args.model))
    versions = origin.pop("versions")
    rows = [
        row
        | origin
        | {"versions": versions | row.get("versions", {}), "device": results.device(row["engine"])}
        for row in rows
    ]
    if args.json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        results.print_table(rows, columns)
    if out is not None:
        for row in rows:
            results.append(out, row)


def chosen(
    outcomes: Mapping[Place, Outcome], samples: Sequence[int], case: int
) -> list[tuple[int, Outcome]]:
    """(sample, outcome) of a case, of those samples that have one."""
    found = ((sample, outcomes.get((sample, case))) for sample in samples)
    return [(sample, outcome) for sample, outcome in found if outcome is not None]
