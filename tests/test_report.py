"""`paged-kv report` without a browser: what the page and its folder hold, mistakes."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import report_rows
from markupsafe import escape
from report_rows import row, write

from paged_kv import cli
from paged_kv.report import charts, page, quality, rows, style

PNG = b"\x89PNG\r\n"
PLOTS = 9 + 1 + 4 + 1 + 1 + 2 + 4  # quality, means, agreement, needle, throughput, latency, layers


def report(results: Path, *args: object) -> str:
    """The page of a file of rows."""
    out = results.with_suffix(".html")
    assert cli.main(["report", str(results), "--out", str(out), *map(str, args)]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of everything, its folder of PNGs."""
    folder = tmp_path_factory.mktemp("report")
    results = write(folder / "rows.jsonl", report_rows.realistic())
    return report(results, "--png", folder / "png"), folder / "png"


def test_every_section_is_there_and_every_plot_once(made):
    text, folder = made
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Summary", "Quality against memory", "Agreement by position", "Needles by depth and length",
        "Throughput by pool size", "Latency by request rate", "Memory by layer", "Tables",
    ]  # fmt: skip
    assert text.count("<svg") == PLOTS
    files = sorted(folder.iterdir())
    assert len(files) == PLOTS
    assert all(file.read_bytes().startswith(PNG) for file in files)
    assert "ruler-niah-single-accuracy-smollm2-135m-instruct.png" in [file.name for file in files]


def test_what_lies_far_from_all_others_is_named_instead():
    look = style.Look("#000000", "-", "o")
    near = [charts.Curve(f"near {n}", [(1, 3 + n / 10), (2, 3 + n / 20)], look) for n in range(5)]
    far = charts.Curve("far", [(1, 5.0), (2, 4.9)], look)
    partly = charts.Curve("partly", [(1, 5.0), (2, 3.1)], look)
    assert charts.outliers([*near, far, partly]) == [far]
    assert charts.outliers([*near[:3], far]) == []  # too few to say
    _, (axes,) = charts.new("title")
    charts.focus(axes, [charts.Curve("a", [(1, 2.0), (2, 3.0)], look, [0.5, None])], [1.0])
    assert axes.get_ylim() == pytest.approx((1 - 0.12, 3 + 0.12))


def test_errors_of_differences_are_drawn_where_they_are_to_the_full_cache():
    full = {"score": 2.0}
    rows = [{"score": 2.5, "vs_first": 0.5, "vs_first_se": 0.1}]
    assert quality.is_paired(rows, [full])
    assert not quality.is_paired(rows, [full, full])
    assert not quality.is_paired([{**rows[0], "vs_first": 0.4}], [full])  # to another line
    assert not quality.is_paired([*rows, {"score": 2.0}], [full])


def test_the_page_loads_nothing(made):
    text, _ = made
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"<(link|img|iframe|object|embed)\b(?![^>]*\"data:)", text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(
        found.startswith(("#", "data:")) for found in re.findall(r'(?:src|href)="([^"]*)', text)
    )


def test_ids_are_unique_and_what_refers_to_one_finds_it(made):
    text, _ = made
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    named = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {first or second for first, second in named} <= set(ids)


def test_drawings_have_no_colors_of_a_light_page(made):
    text, _ = made
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    heat = set(re.findall(r"#[0-9a-f]{6}", drawn))
    assert not heat & set(style.VARIABLES)
    assert {f"var({name})" for name in list(style.VARIABLES.values())[:8]} <= set(
        re.findall(r"var\(--[a-z0-9-]+\)", drawn)
    )
    for name in style.VARIABLES.values():
        assert f"{name}: light-dark(" in text


def test_names_are_shown_and_never_run(tmp_path):
    name = "<script>boom()</script>\"'&$x_1$"
    given = [row("ruler", "full", None, 0.8), *(row("ruler", name, n, 0.5) for n in (64, 128))]
    given += [row("throughput", name, 64, 5.0, share=s, ratio=s, case=name) for s in (0.5, 2.0)]
    for each in given:
        each |= {"model": name, "device": name, "command": name, "versions": {name: name}}
    text = report(write(tmp_path / "rows.jsonl", given))
    assert "<script>boom" not in text
    assert text.count("<script>") == 1
    assert html.unescape(text).count(name) > 10
    assert str(escape(name)) in text  # in a table
    assert "x_1$</text>" in text  # in a drawing, as text


def test_the_latest_row_of_a_claim_counts(tmp_path, capsys):
    given = [row("ruler", "full", None, 0.9)]
    given += [row("ruler", "snapkv", 64, 0.3, date="2026-11-30", command="new")]
    given += [row("ruler", "snapkv", 64, 0.2, date="2026-11-28", command="old")]
    given += [row("ruler", "snapkv", 128, 0.4), row("ruler", "snapkv", 128, 0.5)]
    kept, replaced = rows.latest(given)
    assert sorted(each["score"] for each in kept) == [0.3, 0.5, 0.9]
    assert [(old["score"], new["score"]) for old, new in replaced] == [(0.4, 0.5), (0.2, 0.3)]
    text = report(write(tmp_path / "rows.jsonl", given))
    assert "2 rows left out: measured again later" in text
    assert "snapkv, budget 64: 0.2 of 2026-11-28, now 0.3; the earlier row was made by: old" in text
    assert "rows 3, measured again 2" in capsys.readouterr().out


def test_subtasks_are_folded_below_their_mean(tmp_path):
    tasks = ("ruler", "ruler:vt", "ruler:cwe")
    given = [row(task, "full", None, 0.6) for task in tasks]
    given += [row(task, "tova", 64, 0.3) for task in tasks]
    text = report(write(tmp_path / "rows.jsonl", given))
    assert re.findall(r"<summary>(Subtasks.*)</summary>", text) == [
        "Subtasks of ruler · SmolLM2-135M-Instruct (2)"
    ]


def test_throughput_says_where_it_crosses(tmp_path):
    given = []
    for share, ratios in ((1.0, (0.8, 1.1, 0.7)), (0.5, (1.2, 1.3, 0.9))):
        given += [row("throughput", "plain", None, 100.0, share=share, ratio=1.0)]
        for policy, ratio in zip(("tova", "h2o", "lru"), ratios, strict=True):
            given += [row("throughput", policy, 64, 100 * ratio, share=share, ratio=ratio)]
    text = report(write(tmp_path / "rows.jsonl", given))
    assert "As fast as plain at a pool of: tova 0.75." in text
    assert "Faster at every size measured: h2o." in text
    assert "Slower at every size measured: lru." in text
    assert "Summary" not in text


def test_rows_without_provenance_and_numbers_that_cannot_be_drawn(tmp_path):
    given = [row("ruler", "tova", 64, float("nan")), row("ruler", "h2o", 64, 0.5, kept=None)]
    given += [row("ruler", "full", None, None), row("ruler", "lru", 0.5, 0.5, bytes_per_token=None)]
    for each in given:
        for name in ("model", "model_hash", "versions", "device", "command", "date"):
            del each[name]
    text = report(write(tmp_path / "rows.jsonl", given))
    assert "unknown model" in text
    assert "50 %" in text
    assert text.count("<tr>") == 1 + len(given)


BAD = [
    ("", "results: no rows in the files given"),
    ("{", "not JSON"),
    ("[1]", "not a result row"),
    (
        row("ruler", "tova", 64, "high"),
        "result row 1 (ruler, tova): score must be a number or null",
    ),
    (row("ruler", "", 64, 1.0), "policy must be a name, not ''"),
    (row("ruler", "tova", True, 1.0), "budget must be a number or null, not True"),
    (
        row("ruler", "tova", 64, 1.0, higher_is_better=None),
        "higher_is_better must be true or false",
    ),
    (row("ruler", "tova", 64, 1.0, versions=3), "versions must be an object"),
    (
        row("memory", "tova", 64, 1.0, kept_by_layer=["a"]),
        "kept_by_layer must be a list of numbers",
    ),
    (row("agreement", "tova", 64, 1.0, by_position=[{}]), "by_position must be a list of position"),
    (row("needle", "tova", 64, 1.0, cells={}), "cells must be a list of length, depth, found"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_in_rows(tmp_path, capsys, line, message):
    results = tmp_path / "rows.jsonl"
    results.write_text(line if isinstance(line, str) else json.dumps(line))
    assert cli.main(["report", str(results), "--out", str(tmp_path / "report.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_mistakes_in_paths(tmp_path, capsys):
    results = write(tmp_path / "rows.jsonl", [row("ruler", "tova", 64, 0.5)])
    cases = [
        ([tmp_path / "none.jsonl"], f"results {tmp_path}/none.jsonl: "),
        ([results, "--out", tmp_path], f"out {tmp_path}: "),
        ([results, "--out", results / "report.html"], f"out {results}/report.html: "),
        ([results, "--out", results], f"out {results}: is one of the results"),
        ([results, "--out", tmp_path / "r.html", "--png", results], f"png {results}: "),
    ]
    for args, message in cases:
        assert cli.main(["report", *map(str, args)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"paged-kv: error: {message}"), error
        assert error.count("\n") == 1
    assert len(results.read_text().splitlines()) == 1


def test_page_files_are_part_of_the_package():
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"report/page.*"' in pyproject
    assert {file.suffix for file in page.HERE.glob("page.*")} == {".py", ".html", ".css", ".js"}
