"""A stopped evaluation goes on where it was; what differs is not taken for the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_kv import results
from paged_kv.config import CompressionConfig
from paged_kv.eval.cases import Case
from paged_kv.eval.prompt import Answer, Prompt
from paged_kv.eval.record import Record

PROMPTS = [Prompt([1, 2, 3], [4], 8, frozenset({2})), Prompt([1, 2, 4], [4], 8, frozenset({2}))]
ANSWER = Answer([5, 6], 3.5, 1000, 0.25)


def cases(model: str, budget: int = 96, page_size: int = 32, **options: Any) -> list[Case]:
    whole = CompressionConfig()
    config = CompressionConfig.from_dict({"policy": "snapkv", "budget": budget, **options})
    return [
        Case("full", None, whole, Path(model), page_size),
        Case("snapkv", budget, config, Path(model), page_size),
    ]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results" / "rows.jsonl"


def record(out: Path | None, model: str, **more: Any) -> Record:
    settings = {"engine": "reference", "samples": PROMPTS, "cases": cases(model), **more}
    return Record(out, kind=Answer, **settings)


def test_what_is_done_is_known_again(tiny, out):
    first = record(out, tiny)
    assert first.todo(1, 0)
    first.add(1, 0, ANSWER)
    assert not first.todo(1, 0)
    first.close(is_complete=False)
    again = record(out, tiny)
    assert again.outcomes == {(1, 0): ANSWER}
    assert [place for place in [(0, 0), (0, 1), (1, 0), (1, 1)] if again.todo(*place)] == [
        (0, 0),
        (0, 1),
        (1, 1),
    ]
    again.close(is_complete=True)
    assert not again.path.exists()
    assert out.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "hf"},
        {"samples": [PROMPTS[0], PROMPTS[1]._replace(question=[5])]},
        {"samples": [PROMPTS[0], PROMPTS[1]._replace(max_new_tokens=9)]},
        {"samples": [PROMPTS[0], PROMPTS[1]._replace(stop=frozenset({3}))]},
        {"cases": {"budget": 128}},
        {"cases": {"observation_window": 16}},
        {"cases": {"page_size": 16}},
    ],
)
def test_something_else_is_not_done(tiny, out, change):
    first = record(out, tiny)
    first.add(1, 1, ANSWER)
    first.close(is_complete=False)
    if "cases" in change:
        change = {"cases": cases(tiny, **change["cases"])}
    assert record(out, tiny, **change).outcomes == {}
    assert record(out, tiny).outcomes == {(1, 1): ANSWER}


@pytest.mark.parametrize(("what", "value"), [("versions", {"torch": "9"}), ("device", "a GPU")])
def test_other_versions_and_machines_begin_anew(tiny, out, monkeypatch, what, value):
    """A row names one of each for all that it is a mean over."""
    first = record(out, tiny)
    first.add(1, 1, ANSWER)
    first.close(is_complete=False)
    with monkeypatch.context() as other:
        other.setattr(results, what, lambda *_: value)
        assert record(out, tiny).outcomes == {}
    assert record(out, tiny).outcomes == {(1, 1): ANSWER}


def test_more_cases_and_samples_keep_what_is_done(tiny, out):
    first = record(out, tiny)
    first.add(1, 1, ANSWER)
    first.close(is_complete=False)
    more = {"samples": [PROMPTS[1], PROMPTS[0]], "cases": cases(tiny)[::-1]}
    assert record(out, tiny, **more).outcomes == {(0, 0): ANSWER}


def test_a_line_that_was_cut_off_is_not_done(tiny, out):
    first = record(out, tiny)
    first.add(0, 0, ANSWER)
    first.add(0, 1, ANSWER)
    first.close(is_complete=False)
    first.path.write_text(first.path.read_text()[:-9])
    again = record(out, tiny)
    assert set(again.outcomes) == {(0, 0)}
    again.add(0, 1, ANSWER)  # behind the rest of the broken line
    again.close(is_complete=False)
    assert set(record(out, tiny).outcomes) == {(0, 0), (0, 1)}
    assert all(json.loads(line) for line in first.path.read_text().splitlines()[2:])


def test_what_others_do_is_left(tiny, out):
    stopped = record(out, tiny, engine="hf")
    stopped.add(0, 1, ANSWER)
    stopped.close(is_complete=False)
    one, beside = record(out, tiny), record(out, tiny, samples=PROMPTS[:1])
    one.add(1, 0, ANSWER)
    beside.add(0, 0, ANSWER)
    one.close(is_complete=True)
    assert set(record(out, tiny, engine="hf").outcomes) == {(0, 1)}
    beside.close(is_complete=True)
    again = record(out, tiny, engine="hf")
    again.close(is_complete=True)
    assert not again.path.exists()


def test_a_file_that_somebody_else_has_removed(tiny, out):
    first, second = record(out, tiny), record(out, tiny)
    first.close(is_complete=True)
    second.add(0, 0, ANSWER)
    second.close(is_complete=True)
    assert not second.path.exists()


def test_nothing_is_kept_unless_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = record(None, tiny)
    one.add(0, 0, ANSWER)
    one.close(is_complete=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out .*/file/rows.jsonl: "):
        record(tmp_path / "file" / "rows.jsonl", tiny)
