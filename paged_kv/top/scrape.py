"""The numbers of one answer of /metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from paged_kv.vllm.watch.metrics import METRICS, PREFIX

VLLM = "vllm:"
_IGNORED = ("_created", "_bucket")  # when a series began; histograms

Labels = Mapping[str, str]


def ours(name: str) -> str:
    """What a metric of ours is called on /metrics."""
    return f"{PREFIX}_{name}_total" if METRICS[name].is_counter else f"{PREFIX}_{name}"


class Series(NamedTuple):
    """What a number is. labels: (name, value) pairs, sorted."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @property
    def is_counter(self) -> bool:
        """Whether it only grows, as long as the server lives."""
        return self.name.endswith("_total")

    def matches(self, name: str, labels: Labels) -> bool:
        """Whether it is of that metric and has these labels, among others; "" is a missing one."""
        own = dict(self.labels)
        return self.name == name and all(own.get(k, "") == v for k, v in labels.items())


class Scrape(NamedTuple):
    """What a server said.

    Attributes:
        time: when, in seconds of a clock that never jumps.
        values: numbers of vLLM's metrics and ours; what is no number is left out.
    """

    time: float
    values: Mapping[Series, float]

    def find(self, name: str, **labels: str) -> dict[Series, float]:
        """The series of a metric that have these labels."""
        return {s: value for s, value in self.values.items() if s.matches(name, labels)}

    def total(self, name: str, **labels: str) -> float | None:
        """Their sum; None if there are none."""
        found = self.find(name, **labels)
        return sum(found.values()) if found else None

    def label(self, label: str, *names: str, **labels: str) -> list[str]:
        """The values of a label in these metrics; 2 comes before 10."""
        found = {
            dict(series.labels).get(label, "")
            for name in names
            for series in self.find(name, **labels)
        }
        return sorted(found, key=_natural)

    def of_engine(self, engine: str | None) -> Scrape:
        """What is said of one engine; of all if it is None."""
        if engine is None:
            return self
        mine = ("engine", engine)
        return self._replace(values={s: v for s, v in self.values.items() if mine in s.labels})

    @property
    def is_vllm(self) -> bool:
        """Whether there is anything of vLLM's."""
        return bool(self.values)

    @property
    def has_policy(self) -> bool:
        """Whether there is anything of ours."""
        return any(series.name.startswith(PREFIX) for series in self.values)


def parse(text: str, time: float) -> Scrape:
    """Of Prometheus' text format. Raises ValueError or OverflowError: it is something else."""
    values: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(VLLM) and not sample.name.endswith(_IGNORED):
                series = Series(sample.name, tuple(sorted(sample.labels.items())))
                if math.isfinite(sample.value):
                    values[series] = float(sample.value)
    return Scrape(time, values)


def _natural(text: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
