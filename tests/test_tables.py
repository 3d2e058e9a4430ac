"""The tables in the documents are those of benchmarks/results."""

import runpy
from pathlib import Path

import pytest

from paged_kv import results

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))


@pytest.fixture
def tables(monkeypatch):
    """The script's names."""
    found = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    return lambda **changed: found["main"].__globals__.update(changed) or found["main"]


def test_documents_have_the_tables_of_the_results(tables, capsys):
    assert tables()(["--check"]) == 0, capsys.readouterr().out


def test_a_number_that_differs_is_told(tables, capsys, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    main = tables(ROOT=tmp_path)
    assert main(["--check"]) == 0
    text = (tmp_path / "docs" / "results.md").read_text()
    (tmp_path / "docs" / "results.md").write_text(
        text.replace("| `streaming` | ", "| `streaming` | 9")
    )
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/results.md: differs from benchmarks/results\n"
    assert main([]) == 0
    assert (tmp_path / "docs" / "results.md").read_text() == text


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_can_be_made_again(file):
    """Each row says by which command, on what, and names no place of one machine."""
    for row in results.read([file]):
        assert set(row) >= {*results.FIELDS, *results.PROVENANCE}
        assert row["command"].startswith("paged-kv ")
        assert " /" not in row["command"]
        assert row["model_hash"]


def test_perplexity_is_paired_by_hand(tables):
    def row(policy, budget, text, *nll):
        windows = [{"offset": n, "nll": value} for n, value in enumerate(nll)]
        return {"task": "perplexity", "policy": policy, "budget": budget, "text": text,
                "windows": windows}  # fmt: skip

    rows = [row("full", None, "a", 2.0, 3.0), row("full", None, "b", 1.0, 1.0)]
    rows += [row("x", 64, "a", 2.1, 3.1), row("x", 64, "b", 1.1, 1.1)]
    rows += [row("y", 64, "a", 2.0, 3.1), row("y", 64, "b", 1.0, 1.1)]
    rows += [row("x", 128, "a", 2.0, 3.0), row("x", 128, "b", 1.0, 1.0)]
    rows += [row("y", 128, "a", 2.0, 3.0), row("y", 128, "b", 1.0, 1.1)]
    lines = tables().__globals__["perplexity"](rows)
    # exp(0.1) - 1 = 10.5 %; of 0, 0.1, 0, 0.1: mean 0.05, deviation 0.0577, by the root of 4
    assert lines == [
        "| policy | 64 | 128 |",
        "| --- | --- | --- |",
        "| `x` | 10.5 ± 0.0 | 0.0 ± 0.0 |",
        "| `y` | 5.1 ± 2.9 | 2.5 ± 2.5 |",
    ]
