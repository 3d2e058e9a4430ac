"""Every metric against numbers that were computed by hand."""

import pytest

from paged_kv.eval.tasks.example import Example
from paged_kv.eval.tasks.metrics import METRICS, score

CLASSES = ("Event", "Other event", "Food", "Date")


def example(metric: str, *answers: str, task: str = "a task", classes=()) -> Example:
    return Example("1", task, "text", "question", "", answers, 8, metric, classes=classes)


CASES = [
    # metric, answers, prediction, score
    ("string_match_all", ["12", "34"], "They are 12 and 34.", 1),
    ("string_match_all", ["12", "34"], "12, 12", 1 / 2),
    ("string_match_all", ["12", "34", "56"], "", 0),
    ("string_match_all", ["Red-Fox"], "the red-fox!", 1),
    ("string_match_part", ["12", "34"], "34", 1),
    ("string_match_part", ["12", "34"], "1 2 3 4", 0),
    # {cat, sat} of {black, cat, sat} and {cat, sat, down}: precision and recall 2/3
    ("qa_f1", ["A cat sat down"], "The black cat, sat.", 2 / 3),
    ("qa_f1", ["yes"], "Yes!", 1),
    ("qa_f1", ["no", "not at all"], "Not at all.", 1),  # the better of two
    ("qa_f1", ["one two"], "two two two", 2 / 5),  # once common: 1/3 and 1/2
    ("qa_f1", ["the"], "a", 0),  # nothing is left of both
    ("qa_f1", ["x"], "", 0),
    ("rouge_l", ["police killed the gunman"], "Police kill the gunman.", 3 / 4),
    ("rouge_l", ["police killed the gunman"], "the gunman kill police", 2 / 4),  # in order
    ("rouge_l", ["a b c d e"], "a x c", 2 * 2 / (5 + 3)),
    ("rouge_l", ["x y", "a b"], "a b", 1),
    ("rouge_l", ["..."], "...", 0),  # no words
    ("classification", ["Food"], "Food", 1),
    ("classification", ["Food"], "Food or Date", 1 / 2),
    ("classification", ["Food"], "food", 0),
    ("classification", ["Date"], "Food", 0),
    ("classification", ["Other event"], "Other event", 1),
    ("retrieval", ["Paragraph 5"], "Paragraph 5", 1),
    ("retrieval", ["Paragraph 5"], "5 or 15", 1 / 2),
    ("retrieval", ["Paragraph 5"], "Paragraph five", 0),
    ("retrieval", ["段落5"], "段落5", 1),
    ("count", ["7"], "There are 7, not 17, not 8", 1 / 3),
    ("count", ["7"], "seven", 0),
    # A comment, and a fence, are no code; "x = 1" and "x = 12": 5 of 5 and 6 characters
    ("code_similarity", ["x = 12"], "\n# sets x\n```\nx = 1\ny = 2", 2 * 5 / (5 + 6)),
    ("code_similarity", ["x"], "// x", 0),
    ("code_similarity", ["return"], "return", 1),
]


@pytest.mark.parametrize(("metric", "answers", "prediction", "expected"), CASES)
def test_by_hand(metric, answers, prediction, expected):
    asked = example(metric, *answers, classes=CLASSES)
    assert score(prediction, asked) == pytest.approx(expected)
    assert METRICS[metric](prediction, asked) == pytest.approx(expected)


def test_every_metric_has_a_case():
    assert {metric for metric, *_ in CASES} == set(METRICS)


def test_a_class_inside_the_right_one_does_not_count():
    """Both are named by "city state", but "state" only because it is a part."""
    asked = example("classification", "city state", classes=("state", "city state", "city"))
    assert score("a city state", asked) == 1
    asked = example("classification", "state", classes=("state", "city state", "city"))
    assert score("a city state", asked) == 1 / 3


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht"])
def test_only_the_first_line_after_few_shots(task):
    text = "\n\nFood\nQuestion: What day is it?\nType: Date"
    assert score(text, example("classification", "Food", task=task, classes=CLASSES)) == 1
    assert score(text, example("classification", "Food", classes=CLASSES)) == 1 / 2
