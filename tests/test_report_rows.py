"""What `paged-kv report` makes of rows: which belong together, means, tables, curves."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_rows import row

from paged_kv.report import charts, quality, rows, speed, style, tables
from paged_kv.report.needles import needles
from paged_kv.report.summary import summaries


def groups_of(given):
    return rows.groups(rows.named(given))


def texts(table: tables.Table) -> list[list[str]]:
    return [[cell.text for cell in cells] for cells in table.rows]


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
        {"tasks": ["vt", "cwe"]},
        {"seed": 1},
        {"haystack": "essays.txt"},
        {"depths": [0, 50]},
        {"lengths": [1024]},
        {"offset": 8000},
        {"stride": 100},
        {"prompt_tokens": 512},
        {"new_tokens": 64},
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
        ["snapkv", "80.0 % (1/3)"],
        ["tova", "62.5 %"],
    ]
    assert texts(tables.of_shares(summary)) == [
        ["snapkv", "64", "80.0 %", "–"],
        ["tova", "64", "50.0 %", "75.0 %"],
    ]


def test_more_samples_replace_fewer():
    """Which are there is no setting, nor how long they came out."""
    given = [row("longbench", "tova", 64, 0.5, context_tokens=n, samples=n) for n in (998, 991)]
    assert [each["samples"] for each in rows.latest(given)[0]] == [991]
    assert len(groups_of(given)) == 1


def test_a_policy_is_compared_with_the_full_cache_of_its_engine():
    given = [row("ruler", "full", None, 0.5, engine="vllm"), row("ruler", "full", None, 0.8)]
    given += [
        row("ruler", "tova", 64, 0.4, engine="vllm"),
        row("ruler", "h2o", 64, 0.4, engine="x"),
    ]
    (summary,) = summaries(groups_of(given))
    assert summary.cells["tova"][64].share == 0.8
    assert summary.cells["h2o"][64].share == 0.8  # the first there is


def test_what_ran_the_easy_setting_only_is_not_the_best():
    given = []
    for text, share in (("easy", 0.9), ("hard", 0.4)):
        given += [row("ruler", "full", None, 1.0, text=text)]
        given += [row("ruler", "tova", 64, share, text=text)]
    given += [row("ruler", "h2o", 64, 0.4, text="hard"), row("ruler", "h2o", 64, 0.5, text="easy")]
    given += [row("ruler", "snapkv", 64, 0.95, text="easy")]
    (summary,) = summaries(groups_of(given))
    shown = {cells[0].text: (cells[1].text, cells[1].best) for cells in
             tables.of_summary(summary).rows}  # fmt: skip
    assert shown["snapkv"] == ("95.0 % (1/2)", False)
    assert shown["tova"] == ("65.0 %", True)


def test_names_of_plots_say_what_differs():
    given = [row("ruler", "tova", 64, 0.5, seed=seed, haystack=None) for seed in (0, 1)]
    given += [row("needle", "tova", 64, 0.5, seed=0, depths=[0, 50])]
    assert [group.name for group in groups_of(given)] == [
        "needle, accuracy", "ruler, seed 0, accuracy", "ruler, seed 1, accuracy",
    ]  # fmt: skip
    given += [row("needle", "tova", 64, 0.5, seed=0, depths=[100])]
    assert groups_of(given)[0].name == "needle, depths 0 50, accuracy"
    given = [
        row("throughput", "tova", 64, 9.0, share=1.0, request_rate=rate) for rate in (1, "inf")
    ]
    assert [group.setting for group in groups_of(given)] == ["request rate 1", "request rate inf"]


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


@pytest.mark.parametrize("depths", [[0, 50, 100], [100 / 7, 50]])
def test_names_beside_a_heatmap_do_not_cover_its_depths(depths):
    cells = [{"length": 4096, "depth": depth, "found": 1, "asked": 2} for depth in depths]
    given = [row("needle", name, 64, 0.5, cells=cells) for name in ("full", "calibrated_attention")]
    (group,) = groups_of(given)
    plot = needles(group)
    figure = plot.figure
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    names = [text.get_window_extent() for text in axes.texts if text.get_ha() == "right"]
    shown = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert (len(names), len(shown)) == (2, 2 * len(depths))
    assert max(box.x1 for box in names) < min(box.x0 for box in shown)
    assert min(box.x0 for box in names) >= 0


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


def test_subtasks_count_by_their_mean():
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
