"""The dashboard: what its panels ask for is on a server's /metrics, and is asked for rightly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql
import pytest
import servers
import tiny_models

from paged_kv import cli
from paged_kv.vllm.watch.metrics import METRICS, PREFIX

FILE = Path(__file__).parent.parent / "docs" / "grafana" / "paged_kv.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(p["title"], target["expr"]) for p in PANELS for target in p["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
UNITS = {"short", "bytes", "Bps", "cps", "cpm", "s", "percentunit"}
LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")
# A policy evicts or merges: the server of this test evicts.
ELSEWHERE = "merged_entries"
A_SERVER = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 7
# TYPE vllm:h histogram
vllm:h_bucket{engine="0",le="1"} 2
vllm:h_sum{engine="0"} 1
"""


def test_rows_and_panels():
    assert [row["title"] for row in ROWS] == [
        "Memory", "Compression", "Pressure", "Swap and spill", "Service",
    ]  # fmt: skip
    assert len(PANELS) == 22
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    for panel in PANELS:
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_panels_have_a_place_each():
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert {x for x, _ in cells} == set(range(24)), "Grafana's grid"


def test_the_data_source_and_the_server_are_variables():
    assert list(VARIABLES) == ["datasource", "model_name", "engine"]
    assert (VARIABLES["datasource"]["type"], DASHBOARD["refresh"]) == ("datasource", "5s")
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    sources += [VARIABLES[name]["datasource"] for name in ("model_name", "engine")]
    assert all(s == {"type": "prometheus", "uid": "${datasource}"} for s in sources)
    for name in ("model_name", "engine"):
        assert VARIABLES[name]["includeAll"]
        assert VARIABLES[name]["multi"]
        assert VARIABLES[name]["query"]["query"] == VARIABLES[name]["definition"]


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_queries_are_of_the_chosen_server(title, query):
    chosen = [("model_name", "MatchOp.Re", "$model_name"), ("engine", "MatchOp.Re", "$engine")]
    for use in promql.uses(promql.parse(query)):
        assert use.matchers == chosen
    ranges = re.findall(r"\[(.*?)\]", query)
    assert set(ranges) <= {"$__rate_interval"}


def test_legends_name_the_labels_that_queries_keep():
    for panel in PANELS:
        for target in panel["targets"]:
            kept = {name for u in promql.uses(promql.parse(target["expr"])) for name in u.kept}
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named == kept - {"le"}, panel["title"]


def test_our_metrics_are_shown():
    """All of them, and all of the swap's."""
    shown = {use.name for _, query in QUERIES for use in promql.uses(promql.parse(query))}
    assert {f"{PREFIX}_{n}" + "_total" * m.is_counter for n, m in METRICS.items()} <= shown


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum(vllm:num_requests_running)", None),
        ('sum by (engine) (rate(vllm:prompt_tokens_total{engine="0"}[5m]))', None),
        ("60 * sum(increase(vllm:prompt_tokens_total[1m]))", None),
        ("histogram_quantile(0.5, sum by (le) (rate(vllm:h_bucket[5m])))", None),
        ("sum(vllm:prompt_tokens)", "there is no vllm:prompt_tokens"),
        ("sum(vllm:prompt_tokens_total)", "is a counter: to be used with rate"),
        ("sum(rate(vllm:num_requests_running[5m]))", "is a gauge: not to be used with rate"),
        ('sum(vllm:num_requests_running{rank="0"})', "has no label rank"),
        ("sum by (tier) (vllm:num_requests_running)", "has no label tier"),
        ("sum(vllm:num_requests_running) / sum(vllm:other)", "there is no vllm:other"),
        ("vllm:num_requests_running", "is not aggregated"),
        ("histogram_quantile(0.5, sum(rate(vllm:h_bucket[5m])))", "of its buckets, by le"),
        ("histogram_quantile(0.5, sum by (engine) (rate(vllm:h_sum[5m])))", "buckets, by le"),
        ("60", "asks for nothing"),
    ],
)
def test_what_is_wrong_with_a_query(query, problem):
    """The check itself."""
    found = promql.check(query, promql.metrics(A_SERVER))
    if problem is None:
        assert found == []
    else:
        assert len(found) >= 1
        assert problem in found[0]


@pytest.mark.vllm
def test_a_server(tmp_path, capsys):
    """Under pressure, with swap and spill: every query finds what it asks for, `top` everything."""
    model = tiny_models.saved("llama", tmp_path / "model", tokenizer=True)
    line = [servers.VLLM, "serve", model, "--enforce-eager", "--served-model-name", "tiny"]
    line += ["--max-model-len", "512", "--num-gpu-blocks-override", "100"]
    line += ["--kv-policy", "pyramidal", "--kv-budget", "256", "--kv-start", "pressure"]
    line += ["--kv-swap-space", "0.01", "--kv-policy-config", '{"spill": true}']
    server = servers.Server(line, servers.environment(tmp_path), tmp_path / "log")
    try:
        server.wait_until_ready()
        body = {"model": "tiny", "prompt": [5] * 64, "max_tokens": 2, "ignore_eos": True}
        assert server.post("/v1/completions", body)[0] == 200
        there = promql.metrics(server.get("/metrics"))
        assert cli.main(["top", server.url, "--once", "--interval", "0.1"]) == 0
    finally:
        server.kill()
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    words = [line.split()[0] for line in lines]
    assert [word for word in words if not word.isdecimal()] == [
        "paged-kv", f"{server.url}/metrics", "pool", "bytes", "requests", "pressure", "tokens",
        "prefix", "compactions", "swap", "fallbacks", "spill", "group", "all",
    ]  # fmt: skip
    ours = {name for name in there if name.startswith(PREFIX)}
    merged = f"{PREFIX}_{ELSEWHERE}_total"
    assert len(ours) >= len(METRICS)
    assert merged not in there
    labels = frozenset(("model_name", "engine", *METRICS[ELSEWHERE].labels))
    there[merged] = promql.Metric("counter", labels)
    wrong = {query: found for _, query in QUERIES if (found := promql.check(query, there))}
    assert wrong == {}
    for name in ("model_name", "engine"):
        match = LABEL_VALUES.fullmatch(VARIABLES[name]["definition"])
        assert match["label"] == name
        selector = f"sum by ({name}) ({match['selector']})"
        assert promql.check(selector, there) == []
    swap = {use.name for _, query in QUERIES for use in promql.uses(promql.parse(query))}
    assert {name for name in ours if "_swap_" in name} <= swap, "the dashboard leaves out some"
