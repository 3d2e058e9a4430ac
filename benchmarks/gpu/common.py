"""What the parts of the GPU run share: their options, their lines, and the time they may take."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent.parent
# What a part imports of the project, wherever it was started: the package, and the tests' cases.
PLACES = [str(ROOT), str(ROOT / "tests" / "support")]
for place in reversed(PLACES):
    if place not in sys.path:
        sys.path.insert(0, place)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """With --device, --seconds and --seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a trial of the script, its figures mean nothing (default cuda)")  # fmt: skip
    add("--seconds", type=float, default=600.0, metavar="S",
        help="time: a case that has not begun by then is skipped (default 600)")  # fmt: skip
    add("--seed", type=int, default=None, metavar="N",
        help="of the random inputs (default: another one each time)")  # fmt: skip
    return parser


class Part:
    """A part of the run: prints its lines, runs its cases, and keeps to its time.

    Args:
        name: of the part.
        args: the options of make_parser; a missing seed is drawn.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.device = name, args.device
        self.end = time.monotonic() + args.seconds
        if args.seed is None:
            args.seed = int.from_bytes(os.urandom(4), "little") >> 1
        self.seed = args.seed
        self.failed = False
        self._about: Json | None = None
        # Lines only on stdout: what libraries print goes to stderr.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def line(self, case: str, ok: bool | None, **fields: Any) -> None:
        """Prints a case's line; ok None: it was skipped."""
        self.failed |= ok is False
        if self._about is None:
            self._about = about(self.device)
        line = {"part": self.name, "case": case, "ok": ok, **fields, "seed": self.seed}
        print(json.dumps(line | self._about), file=self._out)

    def case(self, name: str, run: Callable[[], Json]) -> Json | None:
        """Runs a case if there is time, and prints its line.

        Args:
            name: of the case.
            run: gives its fields. An exception is the line's error, and the others go on.

        Returns:
            The fields; None if it was skipped or failed.
        """
        if self.seconds_left <= 0:
            self.line(name, None, skipped="the time is up")
            return None
        start = time.monotonic()
        try:
            fields = run()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()
            self.line(name, False, error=" ".join(reason)[:600])
            return None
        self.line(name, True, **fields, took_s=round(time.monotonic() - start, 2))
        return fields

    @property
    def exit_code(self) -> int:
        return int(self.failed)


def about(device: str) -> Json:
    """device and versions, as every line has them."""
    import torch

    from paged_kv import results

    found = results.versions()
    for name in ("triton", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name() if device == "cuda" else results.device()
    return {"device": gpu, "versions": found}


def wanted(fields: Json, figures: Json) -> Json:
    """wanted and met of a line.

    Args:
        fields: of the line.
        figures: what is wanted of some of them: (">=" or "<=", number). A field that is None was
            not measured.
    """
    met: dict[str, bool | None] = {}
    for name, (sign, figure) in figures.items():
        found = fields.get(name)
        met[name] = None
        if found is not None:
            met[name] = found >= figure if sign == ">=" else found <= figure
    return {"wanted": {name: f"{sign} {figure}" for name, (sign, figure) in figures.items()},
            "met": met}  # fmt: skip
