"""`paged-kv eval agreement | needle | ruler | longbench`, from the command line.

What is asked: test_ruler_tasks.py, test_needle_task.py, test_longbench_tasks.py; how it is scored:
test_metrics.py; what a model answers: test_eval_answers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tiny_models

from paged_kv import cli, results
from paged_kv.eval import needle, reference_answers, ruler

Rows = list[dict[str, Any]]


@pytest.fixture
def evaluate(capsys) -> Callable[..., Rows]:
    """Runs a command; its rows."""

    def run(*args: Any) -> Rows:
        assert cli.main(["eval", *map(str, args), "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture(scope="module")
def longbench(tmp_path_factory) -> Path:
    """A folder as LongBench's, with two tasks of a few short rows."""
    folder = tmp_path_factory.mktemp("longbench")
    (folder / "config").mkdir()
    prompts = {
        "trec": "Classify.\n{context}\n{input}",
        "qasper": "Article: {context}\n\nQuestion: {input}\n\nAnswer:",
    }
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(prompts, 6)))
    shots = "".join(f"Question: Where is town {n}?\nType: Place\n" for n in range(20))
    rows: list[dict[str, Any]] = [
        {
            "dataset": "trec_e",
            "_id": f"t{n}",
            "context": shots,
            "input": f"Question: Where is town {90 + n}?\nType:",
            "answers": ["Place"],
            "all_classes": ["Place", "Date"],
        }
        for n in range(3)
    ]
    for n, times in enumerate((10, 400)):  # the second one is too long
        text = "The sky over the town was red that day. " * times
        row = {"dataset": "qasper", "_id": f"q{n}", "context": text, "input": "What was red?"}
        rows.append({**row, "answers": ["The sky"]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


# ---- rows


def check(rows: Rows, task: str) -> None:
    """What every row has."""
    for row in rows:
        assert set(row) >= {*results.FIELDS, *results.PROVENANCE}, row["task"]
        assert row["task"].split(":")[0] == task
        assert row["samples"] == len(row.get("examples", [0] * row["samples"]))
        assert ("examples" in row) == (len(row.get("tasks", [])) == 1)
        if "examples" in row:
            assert row["score"] == pytest.approx(
                fmean(e["score"] for e in row["examples"]), abs=1e-3
            )


@pytest.mark.model
def test_ruler(evaluate, smollm2_dir):
    args = ["--tasks", "niah_single_1,fwe", "--length", 500, "--examples", 2, "--budget", "128"]
    rows = evaluate("ruler", *args, "--policy", "full,streaming,truncate", "--question", "seen")
    check(rows, "ruler")
    tasks = ["ruler:niah_single_1", "ruler:fwe", "ruler"]
    policies = ["full", "streaming", "truncate"]
    assert [(row["task"], row["policy"]) for row in rows] == [
        (task, policy) for task in tasks for policy in policies
    ]
    full, streaming, truncate = rows[:3]
    assert full["score"] == 1 > streaming["score"]
    assert full["budget"] is None
    assert full["kept"] == pytest.approx(full["context_tokens"], abs=1)
    assert full["kept"] > 480
    assert 128 <= streaming["kept"] < 160
    assert truncate["kept"] == 128
    assert streaming["kept_by_layer"] == [streaming["kept_by_layer"][0]] * 30
    total = rows[-3]
    assert total["samples"] == 4
    assert "examples" not in total  # which the rows of the tasks have
    assert total["score"] == pytest.approx(fmean(rows[i]["score"] for i in (0, 3)), abs=1e-4)


@pytest.mark.model
def test_needle(evaluate, smollm2_dir):
    args = ["--lengths", 300, 500, "--depths", 0, 50, "--facts", 1, "--budget", "96"]
    rows = evaluate("needle", *args, "--policy", "full,window")
    check(rows, "needle")
    full, window = rows
    places = [(length, depth) for length in (300, 500) for depth in (0, 50)]
    for row in rows:
        assert [(cell["length"], cell["depth"]) for cell in row["cells"]] == places
        assert sum(cell["found"] for cell in row["cells"]) == row["score"] * 4
        assert {cell["asked"] for cell in row["cells"]} == {1}
    assert (full["score"], window["score"]) == (1, 0)


@pytest.mark.model
def test_longbench(evaluate, smollm2_dir, longbench):
    args = ["--data", longbench, "--tasks", "trec,qasper", "--examples", 2, "--max-length", 1000]
    rows = evaluate("longbench", *args, "--policy", "full,snapkv", "--budget", 96)
    check(rows, "longbench")
    found = {(row["task"], row["policy"]): row for row in rows}
    assert found["longbench:trec", "full"]["samples"] == 2
    assert found["longbench:trec", "full"]["score"] == 1
    assert found["longbench:qasper", "full"]["samples"] == 1
    assert found["longbench", "full"]["samples"] == 3
    assert found["longbench:trec", "full"]["metric"] == "classification"
    assert found["longbench", "full"]["metric"] == "mean"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 700)


def test_rows_name_the_gpu_only_where_it_ran_the_model(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert results.device() == "NVIDIA H200"
    for engine in ("reference", "hf", "kvpress", "transformers"):
        assert results.device(engine).startswith("CPU: ")


def test_agreement(evaluate, tiny, text):
    """The full cache is compared with itself, whether or not it was asked for."""
    args = ["--model", tiny, "--text", text, "--prompt-tokens", 150, "--new-tokens", 40]
    rows = evaluate("agreement", *args, "--windows", 3, "--policy", "streaming", "--budget", 96)
    check(rows, "agreement")
    full, streaming = rows
    assert full["policy"] == "full"
    assert (full["score"], full["prefix"]) == (1, 40)
    assert full["by_position"] == [{"position": n, "agreement": 1} for n in (0, 16, 32)]
    assert 0 <= streaming["score"] < 1
    assert streaming["prefix"] < 40
    weights = (16, 16, 8)
    parts = [part["agreement"] for part in streaming["by_position"]]
    mean = sum(w * part for w, part in zip(weights, parts, strict=True)) / 40
    assert streaming["score"] == pytest.approx(mean, abs=1e-3)


def test_agreement_by_hand(evaluate, tiny, text):
    from paged_kv.config import CompressionConfig
    from paged_kv.eval.prompt import Prompt
    from paged_kv.eval.reference.engine import ReferenceEngine
    from paged_kv.hf.driver.loading import encode, load_model

    model, tokens = load_model(Path(tiny)), encode(Path(tiny), text.read_text())[5:155]
    options = {"policy": "snapkv", "budget": 96, "compress_prefill": True}
    prompt, written = Prompt(tokens, max_new_tokens=40), []
    for config in (CompressionConfig(), CompressionConfig.from_dict(options)):
        engine = ReferenceEngine(model, config)
        hidden = engine.process(tokens)[-1:]
        written += reference_answers.decode([engine], hidden, prompt)
    equal = [a == b for a, b in zip(*written, strict=True)]
    args = ["--model", tiny, "--text", text, "--prompt-tokens", 150, "--new-tokens", 40]
    args += ["--offset", 5, "--windows", 1, "--policy", "full,snapkv", "--budget", 96]
    _, row = evaluate("agreement", *args)
    assert row["score"] == fmean(equal)
    assert row["prefix"] == [*equal, False].index(False)


# ---- stopped and resumed


def test_ctrl_c_leaves_what_is_done(capsys, tiny, text, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    command = ["eval", "agreement", "--model", tiny, "--text", str(text), "--out", str(out)]
    command += ["--prompt-tokens", "150", "--new-tokens", "20", "--windows", "3", "--json"]
    command += ["--policy", "full,streaming", "--budget", "96"]
    answers, calls = reference_answers.answers, []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(*args)

    monkeypatch.setattr(reference_answers, "answers", once)
    assert cli.main(command) == 130
    output = capsys.readouterr()
    assert [json.loads(line)["samples"] for line in output.out.splitlines()] == [1, 1]
    partial = Path(f"{out}.partial")
    assert f"stopped: 2 of 6 are done; the same command goes on from {partial}" in output.err
    assert results.read([out]) == []

    assert cli.main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(calls) == 4  # the first window is not run again
    assert results.read([out]) == rows
    assert not partial.exists()
    monkeypatch.undo()
    assert cli.main(command) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["score"] for row in again] == [row["score"] for row in rows]
    assert results.read([out]) == rows + again


@pytest.mark.parametrize(
    ("task", "args"),
    [
        (needle, ["--lengths", "1000", "8192", "--depths", "50"]),
        (ruler, ["--length", "8192", "--examples", "2", "--tasks", "vt,cwe"]),
    ],
    ids=["needle", "ruler"],
)
def test_texts_as_long_as_the_model_takes_leave_room_for_the_answer(task, args, monkeypatch):
    found = []
    monkeypatch.setattr(task, "run_examples", lambda *given: found.append(given[3]))
    name = task.__name__.rpartition(".")[2]
    assert cli.main(["eval", name, "--policy", "full", *args]) == 0
    (asked,) = found
    for example, prompt in zip(asked.examples, asked.prompts, strict=True):
        length = example.info["length"]
        assert str(length) in example.id
        assert 0.95 * length <= prompt.num_tokens <= 8192
    assert max(prompt.num_tokens for prompt in asked.prompts) > 8192 - 64


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["needle", "--policy", "full", "--engine", "vllm"], "question hidden: engine vllm"),
        (["needle", "--policy", "nope"], "unknown kv-policy 'nope'"),
        (["needle", "--policy", "truncate", "--budget", "0.5"], "truncate needs a number of tok"),
        (
            ["needle", "--policy", "full", "--lengths", "1000", "9000"],
            "lengths 9000: a prompt and its answer take up to 9",
        ),
        (
            ["ruler", "--policy", "full", "--tasks", "vt", "--length", "8200", "--examples", "1"],
            "length 8200: a prompt and its answer take up to ",
        ),
        (
            ["agreement", "--policy", "full", "--text", "README.md", "--prompt-tokens", "9000"],
            "prompt-tokens 9000 and new-tokens 128 need 9129 tokens; the model has 8192",
        ),
        (
            ["agreement", "--policy", "full", "--text", "README.md", "--offset", "-5"],
            "offset must be an integer >= 0, not -5",
        ),
        (["needle", "--policy", "full", "--depths", "101"], "depths"),
        (["ruler", "--policy", "full", "--tasks", "nope"], "task 'nope' must be one of niah_"),
        (["ruler", "--policy", "full", "--haystack", "/nowhere"], "haystack /nowhere"),
        (
            ["longbench", "--policy", "full", "--data", "/nowhere", "--tasks", "trec"],
            "data /nowhere: no such directory",
        ),
        (
            ["longbench", "--policy", "full", "--data", ".", "--tasks=trec", "--max-length=9000"],
            "max-length must be at most the model's 8192, not 9000",
        ),
        (["agreement", "--policy", "full", "--text", "/nowhere"], "text /nowhere: no such file"),
        (["agreement", "--policy", "truncate", "--text", "README.md"], "unknown kv-policy 'trunc"),
    ],
)
def test_mistakes_are_one_line(smollm2_dir, capsys, monkeypatch, args, message):
    monkeypatch.setattr("paged_kv.eval.reference_answers.load_model", None)  # none gets that far
    assert cli.main(["eval", *args]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("paged-kv: error: ")
    assert message in line
