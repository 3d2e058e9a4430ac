"""One question about a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A prompt in two parts, and what is expected.

    Args:
        id: unique in its task, the same for the same settings and seed.
        task: as niah_single, or trec: what means are taken over.
        context: what is compressed before the question comes, or together with it.
        question: what stands after it.
        answer_prefix: how the answer begins; the model goes on from there.
        answers: what the answer is compared with; never empty.
        max_new_tokens: most tokens of the answer.
        metric: a name in paged_kv.eval.tasks.metrics.METRICS.
        chat: whether context and question are put into the model's chat template, if it has one.
        classes: all labels that an answer may name, for metrics that need them.
        info: what the results are shown by, as length and depth.
    """

    id: str
    task: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    chat: bool = True
    classes: tuple[str, ...] = ()
    info: Mapping[str, int | float | str] = field(default_factory=dict)
