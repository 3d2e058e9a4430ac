"""Policies of commands that compare several, each with options of its own."""

from __future__ import annotations

import json
from pathlib import Path

import engines  # noqa: F401  sets the environment of vLLM
import perplexity_rows
import pytest
import tiny_models
from capacity_models import LLAMA_8B, write
from report_rows import row as row_of

from paged_kv import cli, results
from paged_kv.bench import cases as bench
from paged_kv.bench.rows import of_all
from paged_kv.eval import cases as evaluation
from paged_kv.report import rows as reading
from paged_kv.report import tables
from paged_kv.variants import read_variants

ELSEWHERE = {"budget": "--budget"}


def test_options_of_one_go_before_those_of_all():
    shared = '{"window": 3, "swap_space": 1}'
    found = read_variants("full,pooling:mode=best:window=4,snapkv", shared, ELSEWHERE)
    assert [(one.text, one.policy, one.options) for one in found] == [
        ("full", "full", {"swap_space": 1}),
        ("pooling:mode=best:window=4", "pooling", {"mode": "best", "window": 4, "swap_space": 1}),
        ("snapkv", "snapkv", {"window": 3, "swap_space": 1}),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=true", True),
        ("x=0.5", 0.5),
        ("x=best", "best"),
        ("x=a=b", "a=b"),
        ("x=", ""),
        ("x=[0,1]", [0, 1]),
        ("x=[", "["),
        ("x=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_values_are_json_or_text(text, value):
    (found,) = read_variants(f"pyramidal+snapkv:{text}", None, {})
    assert (found.policy, found.options) == ("pyramidal+snapkv", {"x": value})


def test_peers_may_have_colons():
    found = read_variants("kvpress:tova,tova", '{"window": 3}', {}, ["kvpress:tova"])
    assert [one.options for one in found] == [{}, {"window": 3}]


MISTAKES = {
    "pooling:mode": "policy pooling:mode: 'mode' must be OPTION=VALUE",
    "pooling:budget=3": "policy pooling:budget=3 must not have budget: use --budget",
    "full:mode=best": "policy full:mode=best: full has no options of its own",
    "nope:mode=best": "unknown kv-policy 'nope:mode=best'; known are: full",
    "pooling:mode=first": "mode must be one of mean, max, best, not 'first'",
    "pooling:modes=best": "unknown paged_kv option modes",
    "": "unknown kv-policy ''",
    "pooling,pooling": "policy pooling,pooling: pooling is there 2 times",
    "pooling:mode=best:mode=max": "policy pooling:mode=best:mode=max: an option is there twice",
}


@pytest.mark.parametrize("policy", MISTAKES)
@pytest.mark.parametrize("command", ["perplexity", "throughput", "capacity"])
def test_mistakes(command, policy, tiny, tmp_path, capsys):
    text = tiny_models.write_text(tmp_path / "text.txt", 20)
    line = {
        "perplexity": ["eval", "perplexity", "--text", str(text)],
        "throughput": ["bench", "throughput"],
        "capacity": ["capacity", "--memory", "1GiB"],
    }[command]
    assert cli.main([*line, "--model", tiny, "--policy", policy]) == 2
    assert MISTAKES[policy] in capsys.readouterr().err


# ---- each command


def test_evaluated_in_one_run(tiny, tmp_path, capsys):
    text = tiny_models.write_text(tmp_path / "text.txt", 400)
    names = ["pooling", "pooling:mode=best", "residual:of=snapkv", "residual:of=h2o"]
    args = ["--policy", ",".join(["full", *names]), "--budget", "96"]
    args += ["--prompt-tokens", "160", "--score-tokens", "100"]
    rows = perplexity_rows.run(capsys, tiny, text, *args)
    assert [row["policy"] for row in rows] == ["full", *names]
    assert len({row["nll"] for row in rows}) == 5, "options do something"
    for row in rows[1:]:
        policy, _, options = row["policy"].partition(":")
        more = dict([options.split("=")]) if options else {}
        (alone,) = perplexity_rows.run(
            capsys, tiny, text, "--policy", policy, "--policy-config", json.dumps(more), *args[2:]
        )
        assert alone["nll"] == pytest.approx(row["nll"], abs=1e-5)
        assert alone.get("policy_config") == (more or None)


def test_told_apart_in_results():
    args = cli.build_parser("eval").parse_args([
        "eval", "ruler", "--policy", "pooling,pooling:mode=best", "--page-size", "8",
        "--policy-config", '{"recent_window": 16, "num_sink_tokens": 2}', "--page-format", "int8",
        "--residual-pages", "2",
    ])  # fmt: skip
    common = row_of("ruler", "", 96, 0.5, **of_all(args))
    assert {name: common[name] for name in results.OF_ALL} == {
        "page_size": 8,
        "residual_pages": 2,
        "policy_config": {"num_sink_tokens": 2, "recent_window": 16},
    }
    rows = [{**common, "policy": policy} for policy in args.policy.split(",")]
    for name in results.OF_ALL:
        rows.append({key: value for key, value in rows[0].items() if key != name})
    assert reading.latest(rows) == (rows, [])
    found = reading.groups(reading.named(rows))
    assert len(found) == 1 + len(results.OF_ALL), "what holds for all is a setting of a plot"
    (both,) = (group for group in found if len(group.rows) == 2)
    assert [row["label"] for row in both.rows] == ["pooling", "pooling:mode=best"]
    assert both.setting == "page size 8, residual pages 2, num_sink_tokens 2, recent_window 16"
    (table,) = tables.of_tasks(found)
    column = [heading for heading, _ in table.columns].index("policy config")
    cells = [row[column].text for row in table.rows]
    assert sorted(set(cells)) == ["num_sink_tokens 2, recent_window 16", "–"]


def test_native_pages_of_a_list_have_no_residual(tiny):
    more = '{"residual_pages": 2, "recent_window": 16}'
    found = bench.read_cases("full,streaming", "96", "native,int8", None, more)
    assert [(case.label, case.config.residual_pages) for case in found] == [
        ("full", 0), ("full int8", 2), ("streaming 96", 0), ("streaming 96 int8", 2),
    ]  # fmt: skip
    assert json.loads(found[1].flags()[-1]) == {"page_format": "int8", "residual_pages": 2}
    (alone,) = bench.read_cases("streaming", "96", "native", None, more)
    with pytest.raises(ValueError, match="residual_pages 2: with page_format native"):
        bench.check([alone], Path(tiny))


def test_served(tiny):
    first, second = bench.read_cases("pooling,pooling:mode=best", "96", "native", None, None)
    assert [first.label, second.label] == ["pooling 96", "pooling:mode=best 96"]
    assert second.flags()[:2] == ["--kv-policy", "pooling"]
    assert json.loads(second.flags()[-1]) == {"mode": "best", "page_format": "native"}
    assert second.config.options["mode"] == "best"


def test_planned(tmp_path, capsys):
    model = write(tmp_path / "Llama", LLAMA_8B)
    line = ["capacity", "--model", str(model), "--memory", "40GiB", "--budget", "1024", "--json"]
    assert cli.main([*line, "--policy", "pooling,full,pooling:mode=best,snapkv"]) == 0
    rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["full", "pooling", "pooling:mode=best", "snapkv"]
    rings = [row["query_ring_bytes"] for row in rows]
    assert rings[1] == 0 < rings[2] == rings[3], "the last queries decide"


def test_the_same_cases_in_every_command(tiny):
    args = cli.build_parser("eval").parse_args(
        ["eval", "ruler", "--policy", "pooling:mode=best", "--budget", "96"]
    )
    (one,) = evaluation.read_cases(args, Path(tiny))
    (other,) = bench.read_cases("pooling:mode=best", "96", "native", None, None)
    assert one.config.options == other.config.options
