"""The tables in the documents are those of benchmarks/results."""

import runpy
from pathlib import Path

import pytest

from paged_kv import results

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))


@pytest.fixture
def tables(monkeypatch):
    """The script's names; those that are given are changed."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["main"].__globals__
    return lambda **changed: names.update(changed) or names


def test_documents_have_the_tables_of_the_results(tables, capsys):
    assert tables()["main"](["--check"]) == 0, capsys.readouterr().out


def test_every_table_with_rows_is_in_a_document(tables):
    names = tables()
    texts = [(ROOT / name).read_text() for name in names["DOCUMENTS"]]
    shown = [block[1] for text in texts for block in names["BLOCK"].findall(text)]
    rows, _ = names["latest"](results.read(RESULTS))
    assert sorted(shown) == sorted(
        name for name, make in names["TABLES"].items() if has_rows(make, rows)
    )


def has_rows(make, rows):
    try:
        make(rows)
    except ValueError as error:
        if "has no rows of" not in str(error):
            raise
        return False
    return True


def test_a_number_that_differs_is_told(tables, capsys, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in tables()["DOCUMENTS"]:
        (tmp_path / name).write_text((ROOT / name).read_text())
    main = tables(ROOT=tmp_path)["main"]
    assert main(["--check"]) == 0
    file = tmp_path / "docs" / "results.md"
    text = file.read_text()
    file.write_text(text.replace("| `streaming` | ", "| `streaming` | 9"))
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/results.md: differs from benchmarks/results\n"
    assert main([]) == 0
    assert file.read_text() == text


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_can_be_made_again(file):
    """Each row says by which command, on what, and names no place of one machine."""
    for row in results.read([file]):
        assert set(row) >= {*results.FIELDS, *results.PROVENANCE}
        assert row["command"].startswith("paged-kv ")
        assert " /" not in row["command"]
        assert row["model_hash"]


# ---- tables by hand


def predicted(policy, budget, text, *nll, page_format="native", size=8.0):
    """A row of perplexity."""
    windows = [{"offset": n, "nll": value} for n, value in enumerate(nll)]
    return {"task": "perplexity", "policy": policy, "budget": budget, "text": text,
            "windows": windows, "page_format": page_format, "bytes_per_token": size}  # fmt: skip


def test_perplexity_is_paired(tables):
    rows = [predicted("full", None, "a", 2.0, 3.0), predicted("full", None, "b", 1.0, 1.0)]
    rows += [predicted("x", 64, "a", 2.1, 3.1), predicted("x", 64, "b", 1.1, 1.1)]
    rows += [predicted("y", 64, "a", 2.0, 3.1), predicted("y", 64, "b", 1.0, 1.1)]
    rows += [predicted("x", 128, "a", 2.0, 3.0), predicted("x", 128, "b", 1.0, 1.0)]
    rows += [predicted("y", 128, "a", 2.0, 3.0), predicted("y", 128, "b", 1.0, 1.1)]
    rows.append(predicted("y", 64, "a", 9.0, 9.0, page_format="int4"))  # of another table
    # exp(0.1) - 1 = 10.5 %; of 0, 0.1, 0, 0.1: mean 0.05, deviation 0.0577, by the root of 4,
    # times exp(0.05) 3.03 %
    assert tables()["TABLES"]["perplexity"](rows) == [
        "| policy | 64 | 128 |",
        "| --- | --- | --- |",
        "| `x` | 10.5 ± 0.0 | 0.0 ± 0.0 |",
        "| `y` | 5.1 ± 3.0 | 2.5 ± 2.6 |",
    ]


def test_formats_are_of_cases_that_have_several(tables):
    rows = [predicted("full", None, "a", 2.0, 3.0), predicted("x", 64, "a", 2.1, 3.1, size=2.0)]
    rows.append(predicted("full", None, "a", 2.1, 3.0, page_format="int4", size=1.0))
    # exp(0.05) - 1 = 5.1 %; of 0.1 and 0: deviation 0.0707, by the root of 2, times exp(0.05)
    assert tables()["TABLES"]["formats"](rows) == [
        "| cache | pages | bytes | percent above |",
        "| --- | --- | --- | --- |",
        "| `full` | native | 100.0 % | 0.0 ± 0.0 |",
        "| `full` | int4 | 12.5 % | 5.1 ± 5.3 |",
    ]


def answered(task, policy, budget, *scores):
    """A row of one subtask of LongBench."""
    examples = [{"id": f"{n}", "score": score} for n, score in enumerate(scores)]
    return {"task": task, "policy": policy, "budget": budget, "examples": examples,
            "score": sum(scores) / len(scores), "standard_error": 0.1}  # fmt: skip


def test_two_measurements_of_a_case_are_refused(tables):
    rows = [answered("longbench", "x", 64, 0.5), answered("longbench", "x", 64, 0.6)]
    for name in ("longbench", "longbench-tasks"):
        with pytest.raises(ValueError, match=r"has 2 rows of .*'longbench', 'policy': 'x'"):
            tables()["TABLES"][name](rows)


@pytest.fixture
def longbench():
    """Two examples of each of two subtasks, with 64 entries."""
    rows = [answered("longbench:a", "full", None, 1.0, 1.0)]
    rows += [answered("longbench:b", "full", None, 0.5, 0.5)]
    scores = {"streaming": (0.5, 0.5, 0.0, 0.0), "h2o": (0.0, 0.0, 0.5, 0.5),
              "pooling": (1.0, 0.5, 0.5, 0.0)}  # fmt: skip
    for policy, (one, two, three, four) in scores.items():
        rows.append(answered("longbench:a", policy, 64, one, two))
        rows.append(answered("longbench:b", policy, 64, three, four))
    means = {"full": 0.75, "streaming": 0.25, "h2o": 0.25, "pooling": 0.5}
    for policy, mean in means.items():
        budget = None if policy == "full" else 64
        rows.append(answered("longbench", policy, budget, mean))
    return rows


def test_subtasks_of_one_budget(tables, longbench):
    longbench.append(answered("longbench", "pooling", 128, 0.9))
    assert tables()["TABLES"]["longbench-tasks"](longbench) == [
        "| policy | mean | a | b |",
        "| --- | --- | --- | --- |",
        "| `full` | 75 | 100 | 50 |",
        "| `pooling` | 50 | 75 | 25 |",
        "| `streaming` | 25 | 50 | 0 |",
        "| `h2o` | 25 | 0 | 50 |",
    ]


def test_differences_over_the_same_examples(tables, longbench):
    lines = tables()["TABLES"]["longbench-beside"](longbench)
    # 50, 0, 50, 0 above streaming: mean 25, deviation 28.9, by the root of 4; 100, 50, 0, -50 above
    # h2o: deviation 64.5. Above streaming in both subtasks, above h2o in one.
    assert lines[2] == "| `pooling` | 50.0 | +25.0 ± 14.4 | +25.0 ± 32.3 | 2 | 1 |"
    assert "| `streaming` | 25.0 |  | +0.0 ± 28.9 |  | 1 |" in lines
    assert len(lines) == 5


def test_means_highest_first(tables):
    rows = [answered("ruler", "full", None, 0.9)]
    rows += [answered("ruler", name, budget, score) for name, budget, score in
             (("x", 64, 0.5), ("y", 64, 0.1), ("x", 128, 0.5), ("y", 128, 0.75))]  # fmt: skip
    assert tables()["TABLES"]["ruler"](rows) == [
        "| policy | 64 | 128 |",
        "| --- | --- | --- |",
        "| `y` | 10 ± 10 | 75 ± 10 |",
        "| `x` | 50 ± 10 | 50 ± 10 |",
    ]


def test_speed(tables):
    load = {"requests": 8, "input_len": 256, "output_len": 1024, "share": 0.25}
    served = {"page_format": "native", "running": 4, "preemptions": 3.0, "ttft_ms": 1234.4,
              "ttft_p99_ms": 2000.0, "itl_ms": 50.2, "itl_p99_ms": 99.9}  # fmt: skip
    plain = {"policy": "plain", "budget": None, "score": 101.4, "ratio": 1.0, **load, **served}
    ours = {"policy": "x", "budget": 256, "score": 152.1, "ratio": 1.5, **load, **served,
            "page_format": "int8"}  # fmt: skip
    rows = [{"task": task, **row} for task in ("throughput", "latency") for row in (plain, ours)]
    assert tables()["TABLES"]["throughput"](rows)[2:] == [
        "| 8 of 256 + 1,024 | 25 % | `plain` | native | 101 | 1.00 | 4 | 3 |",
        "| 8 of 256 + 1,024 | 25 % | `x` 256 | int8 | 152 | 1.50 | 4 | 3 |",
    ]
    assert tables()["TABLES"]["latency"](rows)[3] == "| `x` 256 | 1,234 | 2,000 | 50 | 100 | 3 |"


def test_less_memory_is_compared_with_plain_vllm_that_has_all(tables):
    def row(policy, budget, requests, share, score):
        return {"task": "throughput", "policy": policy, "budget": budget, "page_format": "native",
                "requests": requests, "input_len": 256, "output_len": 1024, "share": share,
                "score": score}  # fmt: skip

    rows = [
        row("plain", None, 8, 0.15, 50.0),
        row("x", 256, 8, 0.1504, 120.0),  # in whole pages
        row("x", 256, 8, 0.25, 150.0),  # too much memory
        row("plain", None, 8, 1.0, 100.0),
        row("x", 256, 8, 1.0, 160.0),
        row("x", 256, 4, 0.1, 90.0),  # of another load, which plain vLLM never had all memory for
    ]
    assert tables()["TABLES"]["less-memory"](rows)[2:] == [
        "| 8 of 256 + 1,024 | 15 % | `plain` | native | 50 | 0.50 |",
        "| 8 of 256 + 1,024 | 15 % | `x` 256 | native | 120 | 1.20 |",
    ]
