"""LongBench's rows as examples: what is context, what is question, and whose rows they are."""

import json

import pytest

from paged_kv.eval.tasks import longbench
from paged_kv.eval.tasks.metrics import METRICS, score

PROMPTS = {
    "qasper": "You are given an article.\n\nArticle: {context}\n\nQuestion: {input}\n\nAnswer:",
    "trec": "Determine the type.\n\n{context}\n{input}",
    "gov_report": "Report:\n{context}\n\nNow, write a summary.\n\nSummary:",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
LENGTHS = {"qasper": 128, "trec": 64, "gov_report": 512, "repobench-p": 64}


def row(identity: str, dataset: str = "qasper", **fields) -> dict:
    return {
        "input": f"What is {identity}?",
        "context": f"All about {identity}, {{input}} and {{context}}.",
        "answers": ["this", "that"],
        "length": 7,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": identity,
    } | fields


def write(folder, files: dict, prompts=PROMPTS, lengths=LENGTHS):
    (folder / "config").mkdir(parents=True)
    (folder / "config/dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config/dataset2maxlen.json").write_text(json.dumps(lengths))
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
        (folder / name).write_text("\n".join(lines))
    return folder


def drawn(folder, task="qasper", count=None, seed=0) -> list:
    return list(longbench.examples(folder, task, count, seed))


def test_context_and_question_are_the_template(tmp_path):
    (one,) = drawn(write(tmp_path, {"v1/qasper.jsonl": [row("x")]}))
    assert one.context == (
        "You are given an article.\n\nArticle: All about x, {input} and {context}."
    )
    assert one.question == "\n\nQuestion: What is x?\n\nAnswer:"
    assert one.answer_prefix == ""
    assert one.answers == ("this", "that")
    assert (one.id, one.task, one.metric, one.chat) == ("qasper-x", "qasper", "qa_f1", True)
    assert (one.max_new_tokens, one.classes) == (128, ())
    assert dict(one.info) == {"dataset": "qasper", "words": 7}
    assert score("That.", one) == 1


def test_shots_are_context(tmp_path):
    shots, asked = "Question: A?\nType: Food", "Question: B?\nType:"
    classes = ["Food", "Date"]
    own = row("x", "trec_e", context=shots, input=asked, answers=["Date"], all_classes=classes)
    (one,) = drawn(write(tmp_path, {"e/trec_e.jsonl": [own]}), "trec")
    assert one.context == "Determine the type.\n\nQuestion: A?\nType: Food"
    assert one.question == "\nQuestion: B?\nType:"
    assert (one.task, one.chat, one.classes) == ("trec", False, ("Food", "Date"))
    assert one.info["dataset"] == "trec_e"
    assert score(" Date\nQuestion: C?\nType: Food", one) == 1


def test_code_and_a_task_without_a_question(tmp_path):
    files = {
        "code.jsonl": [row("x", "repobench-p", context="a = 1\n", input="b =\n", answers=["b"])],
        "report.jsonl": [row("y", "gov_report", input="")],
    }
    folder = write(tmp_path, files)
    (code,), (report,) = drawn(folder, "repobench-p"), drawn(folder, "gov_report")
    assert code.question == "b =\nNext line of code:\n"
    assert not code.chat
    assert report.question == "\n\nNow, write a summary.\n\nSummary:"
    assert (report.max_new_tokens, report.metric) == (512, "rouge_l")


def test_rows_of_all_files_once(tmp_path):
    files = {
        "v1/a.jsonl": [row("1"), row("2"), row("other", "hotpotqa")],
        "e/b_e.jsonl": [row("2", "qasper_e", input="another question"), row("3", "qasper_e")],
        "mini/c.jsonl": [row("new", input=row("1")["input"], context=row("1")["context"]), ""],
    }
    ids = {one.id for one in drawn(write(tmp_path, files))}
    assert len(drawn(tmp_path)) == len(ids) == 3
    assert {"qasper-2", "qasper-3"} < ids
    assert len(ids & {"qasper-1", "qasper-new"}) == 1, "the same text under two names"


def test_the_seed_gives_the_order(tmp_path):
    folder = write(tmp_path / "one", {"a.jsonl": [row(str(i)) for i in range(20)]})
    other = write(tmp_path / "two", {"a.jsonl": [row(str(i)) for i in reversed(range(20))]})
    some = drawn(folder, seed=1)
    assert drawn(folder, count=5, seed=1) == some[:5]
    assert drawn(folder, count=30, seed=1) == some, "there are no more"
    assert drawn(other, seed=1) == some, "not the files' order"
    assert drawn(folder, seed=2) != some
    assert {one.id for one in drawn(folder, seed=2)} == {one.id for one in some}


def test_every_task_has_a_metric():
    assert set(longbench.METRIC_OF.values()) <= set(METRICS)
    assert set(longbench.TASKS) > longbench.WITHOUT_CHAT


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (7, [0, 1, 2, 3, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        (4, [0, 1, 4, 5]),
        (3, [0, 4, 5]),
        (1, [5]),
        (0, []),
    ],
)
def test_the_middle_is_cut(size, kept):
    assert longbench.truncated_middle(list(range(6)), size) == kept


@pytest.mark.parametrize(
    ("task", "count", "message"),
    [
        ("vcsum", 1, "task 'vcsum' must be one of narrativeqa, .*repobench-p"),
        ("trec_e", 1, "task 'trec_e' must be one of"),
        ("qasper", 0, "count must be at least 1, not 0"),
        ("musique", 1, "data .* has no musique, only qasper, trec, gov_report, repobench-p"),
        ("trec", 1, r"data .* has no rows of trec: 2 files \*.jsonl have hotpotqa \(1\), qasper"),
    ],
)
def test_mistakes(tmp_path, task, count, message):
    write(
        tmp_path, {"a.jsonl": [row("1"), row("2", "qasper_e")], "b.jsonl": [row("3", "hotpotqa")]}
    )
    with pytest.raises(ValueError, match=message):
        longbench.examples(tmp_path, task, count, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl, line 2: not JSON"),
        ("[]", "a.jsonl, line 2: no row of LongBench: input must be a str"),
        (row("2", answers="this"), "a.jsonl, line 2: no row of LongBench: answers must be a list"),
        (row("2", answers=[]), "a.jsonl, line 2: answers must not be empty"),
    ],
)
def test_mistakes_in_a_row(tmp_path, line, message):
    write(tmp_path, {"a.jsonl": [row("1"), line]})
    with pytest.raises(ValueError, match=message):
        longbench.examples(tmp_path, "qasper", 1, 0)


def test_mistakes_in_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data .*none: no such directory"):
        longbench.examples(tmp_path / "none", "qasper", 1, 0)
    with pytest.raises(ValueError, match=r"must have LongBench's config/dataset2prompt.json"):
        longbench.examples(tmp_path, "qasper", 1, 0)
    write(tmp_path, {})
    with pytest.raises(ValueError, match=r"has no rows of qasper: 0 files \*.jsonl have no rows"):
        longbench.examples(tmp_path, "qasper", 1, 0)
    (tmp_path / "config/dataset2maxlen.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset2maxlen.json cannot be read"):
        longbench.examples(tmp_path, "qasper", 1, 0)


@pytest.mark.parametrize("template", ["no text", "{input} before {context}"])
def test_a_template_that_cannot_be_split(tmp_path, template):
    write(tmp_path, {"a.jsonl": [row("1")]}, prompts={"qasper": template})
    with pytest.raises(ValueError, match=r"the template of qasper must have {context}, and"):
        longbench.examples(tmp_path, "qasper", 1, 0)
