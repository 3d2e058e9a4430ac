"""OUT.partial: what is done of a run whose results are not written yet, a line for each outcome."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


class Partial:
    """Outcomes under keys that say what was run: runs of several kinds may share a file.

    Args:
        out: where the results go; None: nothing is kept.
    """

    def __init__(self, out: Path | None) -> None:
        self.path = None if out is None else Path(f"{out}.partial")

    def read(self) -> list[tuple[str, Any]]:
        """(key, outcome), in the order in which they were added; not of a line that was cut off."""
        return [(key, outcome) for _, key, outcome in self._lines()]

    def add(self, key: str, outcome: Any) -> None:
        """One more, as JSON; it survives whatever happens to this process. Raises OSError."""
        if self.path is None:
            return
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut off: this one begins anew
                    file.write(b"\n")
            file.write(json.dumps({"key": key, "outcome": outcome}).encode() + b"\n")

    def drop(self, keys: Collection[str]) -> None:
        """The results with these keys are written: only what others do is left."""
        if self.path is None or not self.path.exists():
            return
        others = [line for line, key, _ in self._lines() if key not in keys]
        if others:
            self.path.write_text("".join(f"{line}\n" for line in others), encoding="utf-8")
        else:
            self.path.unlink()

    def _lines(self) -> Iterator[tuple[str, str, Any]]:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                read = json.loads(line)
                yield line, read["key"], read["outcome"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue


def digest(value: Any) -> str:
    """Hexadecimal digits that tell values apart, which JSON can carry but for frozensets."""
    text = json.dumps(value, sort_keys=True, default=sorted)  # a frozenset is all that it is not
    return hashlib.sha256(text.encode()).hexdigest()[:20]
