"""What queries in PromQL ask for, and whether a server has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

GROWTH = ("rate", "increase")
VARIABLES = {"$__rate_interval": "4m", "$__interval": "1m"}  # of Grafana, where a duration stands


class Metric(NamedTuple):
    """What is on /metrics. kind: counter, gauge, histogram."""

    kind: str
    labels: frozenset[str]


class Use(NamedTuple):
    """A selector in a query.

    Attributes:
        matchers: label, operator and value.
        around: functions and aggregations that it stands in, outermost first.
        kept: labels that the innermost aggregation keeps; None without one.
    """

    name: str
    matchers: list[tuple[str, str, str]]
    around: list[str]
    kept: list[str] | None


def parse(query: str) -> promql.Expr:
    """The query, with a duration in place of Grafana's. Raises ValueError: it is none."""
    for variable, duration in VARIABLES.items():
        query = query.replace(variable, duration)
    return promql.parse(query)


def uses(expression: promql.Expr) -> Iterator[Use]:
    """Every selector."""
    yield from _uses(expression, [], None)


def _uses(node: promql.Expr, around: list[str], kept: list[str] | None) -> Iterator[Use]:
    if isinstance(node, promql.MatrixSelector):
        node = node.vector_selector
    if isinstance(node, promql.VectorSelector):
        matchers = [(m.name, str(m.op), m.value) for m in node.matchers.matchers]
        yield Use(node.name, matchers, around, kept)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _uses(argument, [*around, node.func.name], kept)
    elif isinstance(node, promql.AggregateExpr):
        by = node.modifier
        assert by is None or by.type == promql.AggModifierType.By, "labels are named, never left"
        labels = list(by.labels) if by else []
        yield from _uses(node.expr, [*around, str(node.op)], labels)
    elif isinstance(node, promql.BinaryExpr):
        yield from _uses(node.lhs, around, kept)
        yield from _uses(node.rhs, around, kept)
    elif isinstance(node, promql.ParenExpr):
        yield from _uses(node.expr, around, kept)
    else:
        assert isinstance(node, promql.NumberLiteral), f"{type(node)}: not looked into"


def metrics(text: str) -> dict[str, Metric]:
    """What a server has, by the names of samples."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                before = found.get(sample.name, Metric(family.type, frozenset()))
                labels = before.labels | frozenset(sample.labels)
                found[sample.name] = Metric(family.type, labels)
    return found


def check(query: str, there: Mapping[str, Metric]) -> list[str]:
    """What is wrong with a query of a server that has these metrics; nothing if it is right."""
    found = list(uses(parse(query)))
    wrong = [problem for use in found for problem in _problems(use, there.get(use.name))]
    return wrong if found else [f"{query} asks for nothing"]


def _problems(use: Use, metric: Metric | None) -> Iterator[str]:
    if metric is None:
        yield f"there is no {use.name}"
        return
    for label in {name for name, _, _ in use.matchers} | set(use.kept or ()):
        if label not in metric.labels:
            yield f"{use.name} has no label {label}"
    grows = any(name in GROWTH for name in use.around)
    if grows != (metric.kind != "gauge"):
        yield f"{use.name} is a {metric.kind}: {'not ' * grows}to be used with rate"
    if use.kept is None:
        yield f"{use.name} is not aggregated"
    if metric.kind == "histogram":
        of_buckets = use.name.endswith("_bucket") and "histogram_quantile" in use.around
        if not of_buckets or "le" not in (use.kept or ()):
            yield f"{use.name} is a histogram: quantiles are of its buckets, by le"
