"""How an answer is scored, from 0 to 1, as RULER and LongBench score it.

ROUGE-L and the similarity of code are both 2 x LCS / (sum of lengths), of words and of characters;
rapidfuzz computes it. F1 over words has no library that does without torch; it is a few lines.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Indel

from paged_kv.eval.tasks.example import Example

Metric = Callable[[str, Example], float]

# Tasks of LongBench with examples before the question: a model may go on with more of them, so only
# the first line is the answer.
ANSWERED_IN_A_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
_COMMENT_MARKS = ("`", "#", "//")


def score(prediction: str, example: Example) -> float:
    """Of what a model wrote after the prompt, by the example's metric."""
    if example.task in ANSWERED_IN_A_LINE:
        prediction = _first_line(prediction)
    return METRICS[example.metric](prediction, example)


def string_match_all(prediction: str, example: Example) -> float:
    """The share of the answers that the prediction contains, in whatever case."""
    return sum(_contained(prediction, example)) / len(example.answers)


def string_match_part(prediction: str, example: Example) -> float:
    """1 if the prediction contains one of the answers, in whatever case."""
    return float(any(_contained(prediction, example)))


def qa_f1(prediction: str, example: Example) -> float:
    """F1 over words, as SQuAD normalizes them; of the answer that fits best."""
    words = Counter(_normalized(prediction))
    return max(_f1(words, Counter(_normalized(answer))) for answer in example.answers)


def rouge_l(prediction: str, example: Example) -> float:
    """F1 of the longest common subsequence of words; of the answer that fits best.

    Words are runs of a-z and 0-9, as in Google's rouge-score. LongBench takes another package
    (rouge), which compares sentence by sentence and gives higher numbers: published ROUGE-L of
    LongBench cannot be compared with these.
    """
    words = _alphanumeric(prediction)
    return max(_similarity(words, _alphanumeric(answer)) for answer in example.answers)


def classification(prediction: str, example: Example) -> float:
    """1 by the number of classes that the prediction names, if the right one is among them.

    A class whose name is a part of the right one's does not count.
    """

    def one(answer: str) -> float:
        named = [name for name in example.classes if name in prediction]
        if answer not in named:
            return 0.0
        return 1 / sum(name == answer or name not in answer for name in named)

    return max(map(one, example.answers))


def retrieval(prediction: str, example: Example) -> float:
    """The share of the prediction's numbers that are the answer's, which is "Paragraph N"."""
    return max(_share(prediction, _paragraph(answer)) for answer in example.answers)


def count(prediction: str, example: Example) -> float:
    """The share of the prediction's numbers that are the answer."""
    return max(_share(prediction, answer) for answer in example.answers)


def code_similarity(prediction: str, example: Example) -> float:
    """Of characters, of the first line that has neither a comment nor a code fence."""
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in _COMMENT_MARKS))
    first = next(code, "")
    return max(_similarity(first, answer) for answer in example.answers)


METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _contained(prediction: str, example: Example) -> list[bool]:
    return [answer.lower() in prediction.lower() for answer in example.answers]


def _normalized(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    words = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", words).split()


def _f1(words: Counter[str], expected: Counter[str]) -> float:
    common = (words & expected).total()
    return 2 * common / (words.total() + expected.total()) if common else 0.0


def _alphanumeric(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """2 x LCS / (sum of lengths); 0 if one is empty."""
    return Indel.normalized_similarity(first, second) if first and second else 0.0


def _share(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _paragraph(answer: str) -> str:
    found = _PARAGRAPH.search(answer)
    assert found, f'an answer of the metric retrieval must be "Paragraph N", not {answer!r}'
    return found[1]
