"""What is done: kept beside the results while an evaluation runs, so that a stopped one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from paged_kv.eval.cases import Case
from paged_kv.model_identity import identity

Outcome = TypeVar("Outcome", bound=NamedTuple)
Place = tuple[int, int]  # index of a sample, index of a case


class Record(Generic[Outcome]):
    """Outcomes by sample and case; those of an earlier run of the same are there at once.

    Args:
        path: where the results go, beside which lies PATH.partial; None: nothing is kept.
        engine: what runs the model.
        samples: what is asked, as values that JSON can carry.
        cases: what is compared.
        kind: of an outcome.

    Raises:
        ValueError: the files cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        engine: str,
        samples: Sequence[Any],
        cases: Sequence[Case],
        kind: Callable[..., Outcome],
    ) -> None:
        self.outcomes: dict[Place, Outcome] = {}
        self._file = None
        if path is None:
            return
        self.path = Path(f"{path}.partial")
        model = identity(cases[0].model)
        asked = [_digest(sample) for sample in samples]
        compared = [_digest([engine, model, str(case), _settings(case)]) for case in cases]
        self._keys = {
            (sample, case): f"{one}.{other}"
            for sample, one in enumerate(asked)
            for case, other in enumerate(compared)
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"out {path}: {error.strerror}") from None
        lines = self._lines()
        if lines and not lines[-1].endswith("\n"):  # cut off: the next one begins anew
            self._file.write("\n")
        known = dict(filter(None, map(_line, lines)))
        for place, key in self._keys.items():
            if key in known:
                self.outcomes[place] = kind(*known[key])

    def todo(self, sample: int, case: int) -> bool:
        """Whether there is no such outcome yet."""
        return (sample, case) not in self.outcomes

    def add(self, sample: int, case: int, outcome: Outcome) -> None:
        """One more; it survives whatever happens to this process."""
        self.outcomes[sample, case] = outcome
        if self._file is not None:
            line = {"key": self._keys[sample, case], "outcome": outcome}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self, is_complete: bool) -> None:
        """The results are written: unless something is missing, only what others do is left."""
        if self._file is None:
            return
        if is_complete:
            own = set(self._keys.values())
            found = ((_line(text), text) for text in self._lines())
            others = [text for line, text in found if line is not None and line[0] not in own]
            self._file.truncate(0)
            self._file.writelines(others)
            if not others:
                self.path.unlink(missing_ok=True)
        self._file.close()

    def _lines(self) -> list[str]:
        assert self._file is not None
        self._file.seek(0)
        return self._file.readlines()


def _settings(case: Case) -> list[Any]:
    return [case.config.to_dict(), case.page_size]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=sorted)  # a frozenset is all that it is not
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _line(text: str) -> tuple[str, list[Any]] | None:
    """(key, outcome); None for a line that was cut off."""
    try:
        line = json.loads(text)
        return line["key"], line["outcome"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
