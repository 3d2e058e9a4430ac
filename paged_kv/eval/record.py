"""What is done: kept beside the results while an evaluation runs, so that a stopped one goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from paged_kv import results
from paged_kv.eval.cases import Case
from paged_kv.model_identity import identity
from paged_kv.partial import Partial, digest

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
        self._partial = Partial(path)
        self.path = self._partial.path
        if path is None or self.path is None:
            return
        model, made_by = identity(cases[0].model), [results.versions(), results.device(engine)]
        asked = [digest(sample) for sample in samples]
        compared = [digest([engine, model, made_by, str(case), _settings(case)]) for case in cases]
        self._keys = {
            (sample, case): f"{one}.{other}"
            for sample, one in enumerate(asked)
            for case, other in enumerate(compared)
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in (path, self.path):
                file.open("a").close()
        except OSError as error:
            raise ValueError(f"out {path}: {error.strerror}") from None
        known = dict(self._partial.read())
        for place, key in self._keys.items():
            if key in known:
                self.outcomes[place] = kind(*known[key])

    def todo(self, sample: int, case: int) -> bool:
        """Whether there is no such outcome yet."""
        return (sample, case) not in self.outcomes

    def add(self, sample: int, case: int, outcome: Outcome) -> None:
        """One more; it survives whatever happens to this process."""
        self.outcomes[sample, case] = outcome
        if self.path is not None:
            self._partial.add(self._keys[sample, case], outcome)

    def close(self, is_complete: bool) -> None:
        """The results are written: unless something is missing, only what others do is left."""
        if is_complete and self.path is not None:
            self._partial.drop({*self._keys.values()})


def _settings(case: Case) -> list[Any]:
    return [case.config.to_dict(), case.page_size]
