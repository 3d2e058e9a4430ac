"""`paged-kv bench`: the same command measures only what is not there; what differs is not the same.

Servers, engines and models are stand-ins; test_bench_serving.py has one run with real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from paged_kv import cli, results
from paged_kv.bench import cache_speedup, client, memory, resume, serving
from paged_kv.bench.client import Served
from paged_kv.bench.series import TIMES

SERVER = SimpleNamespace(cpu_seconds=lambda: 0.0)
LINE = ["bench", "throughput", "--policy", "plain,streaming", "--budget", "96", "--requests", "4"]
LINE += ["--input-len", "100,200", "--output-len", "20", "--rounds", "2"]


@pytest.fixture
def bench(tiny, monkeypatch, capsys) -> Callable[..., list[str]]:
    """Runs a command line as a shell would; the lines that it prints."""

    def run(*words: object) -> list[str]:
        line = [*map(str, words), "--model", tiny]
        monkeypatch.setattr(sys, "argv", ["paged-kv", *line])
        capsys.readouterr()
        run.status = cli.main(line)
        printed = capsys.readouterr()
        run.errors = printed.err
        return printed.out.splitlines()

    return run


@pytest.fixture
def runs(monkeypatch) -> list[tuple[int, int]]:
    """(input_len, seed) of what the servers were asked for; each run is faster than the last."""
    asked: list[tuple[int, int]] = []

    def serve(server, model, load, rate, seed) -> Served:
        asked.append((load.input_len, seed))
        return Served(2.0, 10.0 * len(asked), dict.fromkeys(TIMES, 1.0), 3, 0, 400)

    monkeypatch.setattr(client, "run", serve)
    monkeypatch.setattr(serving, "start", lambda *_: {})
    monkeypatch.setattr(serving, "turn", lambda *_: nullcontext(SERVER))
    return asked


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "rows.jsonl"


def stop_after(count: int, runs: list, monkeypatch) -> None:
    """Ctrl-C comes when so many runs are done."""
    before = client.run

    def serve(*args) -> Served:
        if len(runs) == count:
            monkeypatch.setattr(client, "run", before)
            raise KeyboardInterrupt
        return before(*args)

    monkeypatch.setattr(client, "run", serve)


def test_what_is_done_is_not_measured_again(bench, runs, out):
    table = bench(*LINE, "--out", out)
    assert len(table) == 5
    assert runs == [(size, seed) for size in (100, 200) for seed in (0, 0, 1, 1)]
    text = out.read_text()
    assert bench(*LINE, "--out", out) == table
    assert f"4 of 4 rows are in {out} and not measured again" in bench.errors
    assert "8/8" in bench.errors
    assert (len(runs), out.read_text()) == (8, text)
    printed = bench(*LINE, "--out", out.rename(out.with_name("moved.jsonl")))
    assert printed == table, "where it is written is no part of the command"


def test_json_is_printed_again_and_not_written_again(bench, runs, out):
    lines = bench(*LINE, "--json", "--out", out)
    assert bench(*LINE, "--json", "--out", out) == lines
    assert out.read_text().splitlines() == lines


def test_only_the_load_that_is_missing_is_measured(bench, runs, out):
    bench(*LINE, "--out", out)
    first = out.read_text().splitlines()[:2]
    out.write_text("\n".join(first) + "\n")
    bench(*LINE, "--out", out)
    assert [size for size, _ in runs[8:]] == [200] * 4
    assert out.read_text().splitlines()[:2] == first
    assert len(results.read([out])) == 4


def test_a_load_is_measured_as_a_whole(bench, runs, out):
    """A ratio is by the plain row beside it."""
    bench(*LINE, "--out", out)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:3]) + "\n")
    bench(*LINE, "--out", out)
    assert [size for size, _ in runs[8:]] == [200] * 4
    assert [row["policy"] for row in results.read([out])][3:] == ["plain", "streaming"]


@pytest.mark.parametrize("words", [("--seed", 1), ("--rounds", 3), ("--budget", 128)])
def test_another_command_is_measured(bench, runs, out, words):
    bench(*LINE, "--out", out)
    bench(*LINE, *words, "--out", out)
    assert len(runs) >= 16
    assert len(results.read([out])) == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("versions", {"vllm": "9"}), ("device", "another"), ("identity", "another")],
)
def test_another_version_device_or_model_is_measured(bench, runs, out, monkeypatch, name, value):
    bench(*LINE, "--out", out)
    monkeypatch.setattr(results, name, lambda *_: value)
    bench(*LINE, "--out", out)
    assert len(runs) == 16
    assert len(results.read([out])) == 8


def test_the_date_is_no_difference_and_the_newest_row_is_shown(bench, runs, out):
    bench(*LINE, "--out", out)
    rows = results.read([out])
    for row in rows:
        results.append(out, row | {"date": "2001-01-01", "score": 77.0})
    assert all("77.0" in line for line in bench(*LINE, "--out", out)[1:])
    assert len(runs) == 8


def test_rounds_of_an_interrupted_load_are_kept(bench, runs, out, monkeypatch):
    stop_after(7, runs, monkeypatch)
    assert len(bench(*LINE, "--out", out)) == 3, "the first load's rows"
    assert bench.status == 130
    partial = Path(f"{out}.partial")
    assert partial.exists()
    bench(*LINE, "--out", out)
    assert runs[7:] == [(200, 1), (200, 1)], "half a round is run again"
    assert "2 of 4 rows" in bench.errors
    assert not partial.exists()
    plain, streaming = results.read([out])[2:]
    # Runs 5 and 6 before, 8 and 9 now, each 10 tokens/s faster than the last
    assert (plain["score"], streaming["score"], plain["samples"]) == (65, 75, 2)
    assert streaming["ratios"] == [round(60 / 50, 4), round(90 / 80, 4)]


def test_rounds_of_another_command_are_not_taken(bench, runs, out, monkeypatch):
    stop_after(2, runs, monkeypatch)
    bench(*LINE, "--out", out)
    bench(*LINE, "--seed", 7, "--out", out)
    assert runs[2:4] == [(100, 7), (100, 7)]
    assert len(runs) == 2 + 8
    bench(*LINE, "--out", out)
    assert len(runs) == 2 + 8 + 6, "and are still there for their own"
    assert not Path(f"{out}.partial").exists()


def test_a_line_that_was_cut_off_and_those_of_others(bench, runs, out, monkeypatch):
    partial = Path(f"{out}.partial")
    partial.write_text('{"key": "eval\'s", "outcome": [1]}\n')
    stop_after(6, runs, monkeypatch)
    bench(*LINE, "--out", out)
    partial.write_text(partial.read_text().rstrip()[:-9])
    stop_after(8, runs, monkeypatch)
    bench(*LINE, "--out", out)
    bench(*LINE, "--out", out)
    assert runs[6:] == [(200, 0), (200, 0), (200, 1), (200, 1)], "written behind the broken line"
    assert json.loads(partial.read_text()) == {"key": "eval's", "outcome": [1]}


def test_without_a_file_nothing_is_kept(bench, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench(*LINE)
    bench(*LINE)
    assert len(runs) == 16
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_an_error(bench, runs, out):
    out.write_text("no rows\n")
    bench(*LINE, "--out", out)
    assert bench.status == 2
    assert f"results {out}:1: not JSON" in bench.errors
    assert runs == []


def test_memory_measures_the_cases_that_are_missing(bench, out, monkeypatch):
    counted = []

    def measured(args, case, load) -> tuple[results.Row, list[str]]:
        counted.append((case.policy, load.input_len))
        row = dict.fromkeys([*results.FIELDS, *memory.COLUMNS], 1) | {"task": "memory"}
        row |= memory.case_fields(args, case, load) | results.provenance(args.model)
        return row, ["wrong"] if len(counted) == 2 else []

    monkeypatch.setattr(memory, "checked", measured)
    line = ["bench", "memory", *LINE[2:-2], "--out", out]
    assert len(bench(*line)) == 4
    assert (bench.status, len(counted)) == (1, 4)
    table = bench(*line)
    assert counted[4:] == [("streaming", 100)], "which was no result"
    assert (bench.status, len(table)) == (0, 5)
    assert bench(*line) == table
    assert (len(counted), len(results.read([out]))) == (5, 4)


def test_cache_speedup_keeps_its_lengths(bench, tmp_path, monkeypatch):
    counted = []

    def decode(args, model, length) -> dict[str, list[float]]:
        counted.append(length)
        return {cache_speedup.CACHED: [0.1], cache_speedup.UNCACHED: [0.2]}

    monkeypatch.setattr(cache_speedup, "decode", decode)
    line = ["bench", "cache-speedup", "--rounds", 1, "--out", tmp_path, "--lengths"]
    lines = bench(*line, 60, 40)
    rows = tmp_path / "cache_speedup.jsonl"
    assert [row["length"] for row in results.read([rows])] == [40, 60]
    (tmp_path / "cache_speedup.png").unlink()
    assert bench(*line, 60, 40) == lines
    assert counted == [40, 60]
    assert (tmp_path / "cache_speedup.png").exists()
    rows.write_text(rows.read_text().splitlines()[1] + "\n")
    bench(*line, 60, 40)
    assert counted == [40, 60, 40]
    bench(*line, 60, 50)
    assert counted == [40, 60, 40, 50, 60], "another command"


def test_a_device_file_is_not_read(tmp_path):
    assert resume.known(Path("/dev/null"), [{}]) == [None]
    assert resume.known(tmp_path / "new", [{}]) == [None]
