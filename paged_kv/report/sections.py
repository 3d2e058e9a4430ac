"""The sections of plots, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paged_kv.report import quality, speed
from paged_kv.report import rows as reading
from paged_kv.report.needles import needles
from paged_kv.report.page import Section
from paged_kv.report.rows import Group
from paged_kv.report.style import Look, Plot

Looks = Mapping[str, Look]


def make_sections(groups: Sequence[Group], looks: Looks) -> list[Section]:
    """All of them; those without plots, too."""
    asked = [group for group in groups if group.task not in reading.SPEED]
    positions = [plot for group in asked for plot in quality.by_position(group, looks)]
    found = _drawn(needles(group) for group in asked)
    pools = _drawn(speed.throughput(group, looks) for group in _of(reading.THROUGHPUT, groups))
    rates = [p for group in _of(reading.LATENCY, groups) for p in speed.latency(group, looks)]
    return [
        _against_memory(asked, looks),
        Section("agreement", "Agreement by position", "", positions),
        Section("needle", "Needles by depth and length", "", found),
        Section("throughput", "Throughput by pool size", "Rings mark where a policy is as fast as "
                "plain vLLM.", pools),
        Section("latency", "Latency by request rate", "", rates),
        Section("layers", "Memory by layer", "Policies of equal budget.", _layers(groups, looks)),
    ]  # fmt: skip


def _against_memory(groups: Sequence[Group], looks: Looks) -> Section:
    """A task's subtasks are folded if their mean is there."""
    means = {(group.place, group.task) for group in groups if not group.subtask}
    folded: dict[str, list[Group]] = {}
    shown = []
    for group in groups:
        if group.subtask and (group.place, group.task) in means:
            folded.setdefault(f"{group.task} · {group.place}", []).append(group)
        else:
            shown.append(group)
    drawn = {
        f"Subtasks of {name}": _drawn(quality.against_memory(group, looks) for group in members)
        for name, members in folded.items()
    }
    text = "A curve for each policy through its budgets; the dashed line is the full cache, with "
    text += "its size in parentheses."
    plots = _drawn(quality.against_memory(group, looks) for group in shown)
    return Section("quality", "Quality against memory", text, plots, drawn)


def _layers(groups: Sequence[Group], looks: Looks) -> list[Plot]:
    plots: list[Plot] = []
    for place in dict.fromkeys(group.place for group in groups):
        plots += quality.by_layer([group for group in groups if group.place == place], looks)
    return plots


def _of(task: str, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.task == task]


def _drawn(plots: Iterable[Plot | None]) -> list[Plot]:
    return [plot for plot in plots if plot is not None]
