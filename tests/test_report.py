"""`paged-kv report` without a browser: which rows count, what is drawn, what the page holds."""

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
from paged_kv.report import charts, page, quality, rows, speed, style, tables
from paged_kv.report.summary import summaries

PNG = b"\x89PNG\r\n"
PLOTS = 9 + 1 + 4 + 1 + 1 + 2 + 4  # quality, means, agreement, needle, throughput, latency, layers


def report(results: Path, *args: object) -> str:
    """The page of a file of rows."""
    out = results.with_suffix(".html")
    assert cli.main(["report", str(results), "--out", str(out), *map(str, args)]) == 0
    return out.read_text()


def groups_of(given):
    return rows.groups(rows.named(given))


def texts(table: tables.Table) -> list[list[str]]:
    return [[cell.text for cell in cells] for cells in table.rows]


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


@pytest.mark.parametrize(
    "more",
    [
        {"budget": 0.25},
        {"page_format": "int8"},
        {"engine": "vllm"},
        {"model_hash": "f"},
        {"device": "GPU"},
        {"metric": "f1"},
        {"start": "pressure"},
        {"subtask": "qa"},
        {"length": 4096},
    ],
)
def test_another_claim_replaces_nothing(more):
    given = [row("ruler", "snapkv", 64, 0.4), {**row("ruler", "snapkv", 64, 0.5), **more}]
    assert rows.latest(given) == (given, [])


def test_labels_say_what_it_takes_and_no_more():
    given = [row("ruler", "full", None, 0.9), row("ruler", "snapkv", 64, 0.5)]
    given += [row("ruler", "snapkv", 64, 0.5, engine="vllm")]
    given += [row("ruler", "tova", 64, 0.5, page_format="int8", start="pressure")]
    given += [row("throughput", "tova", n, 9.0, engine="vllm", share=1.0) for n in (64, 128)]
    assert [each["label"] for each in rows.named(given)] == [
        "full", "snapkv · reference", "snapkv · vllm", "tova · int8 · pressure", "tova · 64",
        "tova · 128",
    ]  # fmt: skip
    assert {each["place"] for each in rows.named(given)} == {"SmolLM2-135M-Instruct"}
    given.append(row("ruler", "tova", 64, 0.5, device="GPU"))
    assert "SmolLM2-135M-Instruct · GPU" in {each["place"] for each in rows.named(given)}


def test_plots_are_of_one_model_task_metric_and_setting():
    given = [row("ruler", "tova", 64, 0.5, subtask=name) for name in ("vt", "cwe", "vt")]
    given += [row("perplexity", "tova", 64, 2.5, metric="nll", prompt_tokens=1024)]
    given += [row("throughput", "tova", 64, 2.5, metric="tokens_per_second", start="pressure",
                  requests=24, prompt_tokens=n) for n in (511, 512)]  # fmt: skip
    given += [row("agreement", "tova", 64, 0.9, metric="agreement")]
    assert [(group.name, len(group.rows)) for group in groups_of(given)] == [
        ("perplexity, prompt tokens 1,024, nll", 1),
        ("agreement", 1),
        ("ruler, cwe, accuracy", 1),
        ("ruler, vt, accuracy", 2),
        ("throughput, requests 24, tokens_per_second", 2),
    ]


def test_the_summary_is_a_mean_over_tasks_of_shares():
    nll = {"metric": "nll", "higher_is_better": False}
    given = [row("ruler", "full", None, 0.8, subtask="a"), row("ruler:b", "full", None, 0.5)]
    given += [row("ruler", "tova", 64, 0.4, subtask="a"), row("ruler:b", "tova", 64, 0.5)]
    given += [
        row("perplexity", "full", None, 2.0, **nll),
        row("perplexity", "tova", 64, 4.0, **nll),
    ]
    given += [row("perplexity", "snapkv", 64, 2.5, **nll), row("needle", "snapkv", 64, 0.1)]
    (summary,) = summaries(groups_of(given))
    assert summary.tasks == ["perplexity", "ruler"]
    assert summary.left_out == ["needle, accuracy"]
    tova = summary.cells["tova"][64]
    assert tova.by_task == {"perplexity": 0.5, "ruler": 0.75}  # the latter of 0.5 and 1
    assert tova.share == 0.625
    assert tova.memory == 64 / 2048
    assert texts(tables.of_summary(summary)) == [
        ["snapkv", "80.0 % (1/2)"],
        ["tova", "62.5 %"],
    ]
    assert texts(tables.of_shares(summary)) == [
        ["snapkv", "64", "80.0 %", "–"],
        ["tova", "64", "50.0 %", "75.0 %"],
    ]


def test_subtasks_count_by_their_mean_and_are_folded(tmp_path):
    given = []
    for task, full, tova in (("ruler", 0.6, 0.3), ("ruler:vt", 0.2, 0.2), ("ruler:cwe", 1.0, 0.4)):
        given += [row(task, "full", None, full), row(task, "tova", 64, tova)]
    groups = groups_of(given)
    assert [(group.task, group.subtask) for group in groups] == [
        ("ruler", ""), ("ruler", "cwe"), ("ruler", "vt"),
    ]  # fmt: skip
    (summary,) = summaries(groups)
    assert summary.cells["tova"][64].by_task == {"ruler": 0.5}
    (table,) = tables.of_tasks(groups)
    assert len(table.rows) == 6
    text = report(write(tmp_path / "rows.jsonl", given))
    assert re.findall(r"<summary>(Subtasks.*)</summary>", text) == [
        "Subtasks of ruler · SmolLM2-135M-Instruct (2)"
    ]


def test_the_length_asked_for_counts_before_that_of_the_contexts():
    given = [row("ruler", "tova", 64, 0.5, context_tokens=n, length=1024) for n in (998, 991)]
    assert len(groups_of(given)) == 1
    assert len(groups_of([{**each, "length": None} for each in given])) == 2


def test_a_policy_is_compared_with_the_full_cache_of_its_engine():
    given = [row("ruler", "full", None, 0.5, engine="vllm"), row("ruler", "full", None, 0.8)]
    given += [
        row("ruler", "tova", 64, 0.4, engine="vllm"),
        row("ruler", "h2o", 64, 0.4, engine="x"),
    ]
    (summary,) = summaries(groups_of(given))
    assert summary.cells["tova"][64].share == 0.8
    assert summary.cells["h2o"][64].share == 0.8  # the first there is


def test_the_best_of_a_budget_ran_all_tasks():
    given = [row(task, "full", None, 1.0) for task in ("ruler", "longbench")]
    given += [row(task, "tova", 64, 0.5) for task in ("ruler", "longbench")]
    given += [row(task, "h2o", 64, 0.4) for task in ("ruler", "longbench")]
    given += [row("ruler", "snapkv", 64, 0.9)]
    (summary,) = summaries(groups_of(given))
    best = [cells[0].text for cells in tables.of_summary(summary).rows if cells[1].best]
    assert best == ["tova"]


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(0.2, 1.5), (1.0, 0.5)], [0.6]),
        ([(1.0, 0.9), (0.5, 1.0), (0.2, 1.2)], [0.5]),
        ([(0.2, 1.5), (1.0, 1.1)], []),
        ([(0.0, 0.5), (1.0, 1.5), (2.0, 0.5)], [0.5, 1.5]),
    ],
)
def test_crossings(points, found):
    assert speed.crossings(points) == pytest.approx(found)


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


def test_a_cache_without_a_budget_is_in_every_plot_by_position():
    points = [{"position": 0, "agreement": 1.0}, {"position": 64, "agreement": 0.5}]
    given = [row("agreement", "int4", None, 0.9, by_position=points)]
    given += [row("agreement", "full", None, 1.0, by_position=points)]

    def legends() -> list[list[str]]:
        (group,) = groups_of(given)
        looks = style.looks(rows.labels(group.rows))
        with style.drawing():
            plots = list(quality.by_position(group, looks))
        return [[each.get_text() for each in plot.figure.axes[0].texts] for plot in plots]

    assert legends() == [["int4"]]
    given += [row("agreement", "tova", n, 0.5, by_position=points[:1]) for n in (64, 128)]
    assert [sorted(names) for names in legends()] == [["int4", "tova"]] * 2


def test_many_curves_look_apart():
    labels = [f"policy {number}" for number in range(28)]
    looks = style.looks(["full", *labels], ["full"])
    assert len(set(looks.values())) == 29
    assert len({(look.color, look.linestyle) for look in looks.values()}) == 29
    assert looks["full"].color not in style.SERIES


def test_labels_at_the_ends_of_curves_do_not_overlap():
    assert charts.spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    found = charts.spread([0.5, 0.5, 0.52], 0.1)
    assert found == pytest.approx([0.5, 0.6, 0.7])
    assert charts.spread([0.95, 0.97, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])


def test_tables_show_every_field_of_a_task():
    given = [row("throughput", "tova", 64, 1234.5678, standard_error=0.5, share=0.5, running=3,
                 requests=24)]  # fmt: skip
    given += [row("throughput", "plain", None, 0.5, standard_error=None, kept=None, samples=1,
                  requests=24)]  # fmt: skip
    (table,) = tables.of_tasks(groups_of(given))
    assert table.note == "model SmolLM2-135M-Instruct, requests 24"
    assert [name for name, _ in table.columns] == [
        "policy", "budget", "format", "engine", "share", "score", "metric", "kept", "bytes/token",
        "seconds", "samples", "running",
    ]  # fmt: skip
    assert texts(table) == [
        ["plain", "all", "native", "reference", "–", "0.5000", "accuracy", "–", "23,040", "12.5",
         "1", "–"],
        ["tova", "64", "native", "reference", "0.5", "1,234.57 ± 0.50", "accuracy", "64", "720",
         "12.5", "50", "3"],
    ]  # fmt: skip
    assert [cells[5].value for cells in table.rows] == [0.5, 1234.5678]


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
