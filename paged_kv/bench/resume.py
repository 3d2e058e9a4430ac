"""What is done is not measured again: the same command goes on where it was.

The same are the command line but for --out, the model, versions, processor or GPU, and what a row
says of its case. Rows are looked up in FILE. The rounds of a load that was interrupted lie in
FILE.partial until its rows are written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from paged_kv import results
from paged_kv.bench.client import Served
from paged_kv.partial import Partial, digest
from paged_kv.results import Row


def asked(
    args: argparse.Namespace, task: str, cases: Iterable[Row], engine: str = results.VLLM
) -> list[Row]:
    """Fields that tell rows of this command from others, known before it runs.

    Args:
        args: model is a directory.
        task: the command's name.
        cases: what the rows say of their cases.
        engine: what runs the model.
    """
    import torch  # noqa: F401  results.device() sees no GPU without it

    origin = results.provenance(args.model, engine=engine)
    del origin["date"]
    return [{"task": task, **fields, **origin} for fields in cases]


def known(out: Path | None, wanted: Sequence[Row]) -> list[Row | None]:
    """For each the newest row of a file that has all these fields, None if there is none.

    Raises:
        ValueError: the file holds something else than result rows.
    """
    if out is None or not out.is_file():
        return [None] * len(wanted)
    rows = results.read([out])[::-1]
    return [next((row for row in rows if row | fields == row), None) for fields in wanted]


def tell(out: Path | None, done: int, total: int) -> None:
    """Says that rows are not new, and how to get others."""
    if done:
        print(
            f"{done} of {total} rows are in {out} and not measured again; another --out does so",
            file=sys.stderr,
        )


class Record:
    """What there is of one load: its rows, or the rounds that all its cases have finished.

    Args:
        out: where the rows go, beside which lies OUT.partial; None: nothing is kept.
        wanted: `asked` of its rows.

    Attributes:
        rows: all of them; empty if one is missing, for their ratios belong together.
        rounds: what each case did, of each round at each rate.
    """

    def __init__(self, out: Path | None, wanted: Sequence[Row]) -> None:
        found = [row for row in known(out, wanted) if row is not None]
        self.rows = found if len(found) == len(wanted) else []
        self.rounds: list[list[Served]] = []
        self._key = digest(wanted)
        self._partial = Partial(out)
        for key, outcome in self._partial.read():
            if key == self._key:
                self.rounds.append([Served(**fields) for fields in outcome])

    def add(self, latest: Sequence[Served]) -> None:
        """One more round; it survives whatever happens to this process."""
        self.rounds.append(list(latest))
        self._partial.add(self._key, [asdict(served) for served in latest])

    def close(self) -> None:
        """The rows are written: only what others do is left."""
        self._partial.drop({self._key})
