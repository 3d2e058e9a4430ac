"""`paged-kv bench throughput` and `latency`: what they read, refuse and compute, and one run."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from paged_kv import cli, results
from paged_kv.bench import arguments, client, series, serving
from paged_kv.bench.cases import Load, read_cases, read_loads
from paged_kv.bench.client import PREEMPTIONS, PROMPT_TOKENS, Served
from paged_kv.bench.server import Refused, Server, first_reason

LOAD = Load(input_len=100, output_len=20, requests=4, pool_tokens=320)
# What `vllm bench serve --save-result` writes, as far as it is read.
RESULT = {
    "completed": 4,
    "total_output_tokens": 80,
    "duration": 2.0,
    "output_throughput": 40.0,
    "median_ttft_ms": 11.0,
    "mean_ttft_ms": 12.0,
    "p99_ttft_ms": 13.0,
    "median_itl_ms": 1.0,
    "mean_itl_ms": 2.0,
    "p99_itl_ms": 3.0,
    "median_tpot_ms": 4.0,
}


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True)}


def test_the_clients_result_is_read():
    counted = {PREEMPTIONS: 5.0, PROMPT_TOKENS: 400.0}
    one = client.read_result(RESULT, LOAD, "plain", 3.0, counted)
    expected = {"ttft_ms": 11, "ttft_mean_ms": 12, "ttft_p99_ms": 13}
    expected |= {"itl_ms": 1, "itl_mean_ms": 2, "itl_p99_ms": 3, "tpot_ms": 4}
    assert one == Served(2.0, 40.0, expected, 3, 5, 400)
    assert set(one.times) == set(series.TIMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completed": 3}, "plain: 3 of 4 requests were answered, with 80 of 80 tokens"),
        ({"total_output_tokens": 79}, "plain: 4 of 4 requests were answered, with 79 of 80"),
    ],
)
def test_an_answer_that_is_missing_is_an_error(change, message):
    with pytest.raises(RuntimeError, match=message):
        client.read_result({**RESULT, **change}, LOAD, "plain", 3.0, {})


def test_a_client_that_fails_says_why(tmp_path):
    log = io.StringIO("starting\nno route\n")
    with pytest.raises(RuntimeError, match=r"client failed \(1\); it printed:\nstarting\nno route"):
        client._saved(tmp_path / "result.json", 1, log)
    (tmp_path / "result.json").write_text('{"completed": 4}')
    assert client._saved(tmp_path / "result.json", 0, log) == {"completed": 4}


def test_a_run_takes_the_servers_counts_meanwhile(monkeypatch, tiny):
    code = "import sys; line = sys.argv; folder = line[line.index('--result-dir') + 1]; "
    code += f"open(folder + '/result.json', 'w').write({json.dumps(RESULT)!r})"
    monkeypatch.setattr(client, "VLLM", [sys.executable, "-c", code])
    looks = itertools.chain([(0, 7, 50), (3, 7, 50)], itertools.repeat((2, 9, 450)))

    class Fake:
        name, port = "plain", 1

        def metrics(self):
            names = (client.RUNNING, PREEMPTIONS, PROMPT_TOKENS)
            return dict(zip(names, next(looks), strict=True))

        def check(self):
            pass

    one = client.run(Fake(), Path(tiny), LOAD, math.inf, 0)
    assert (one.running, one.preemptions, one.prompt_tokens) == (3, 2, 400)
    assert one.tokens_per_second == 40


def test_cases_become_flags():
    found = read_cases("plain,plain-fp8,full,pyramidal", "0.25,256", "int8", "pressure", None)
    labels = ["plain", "plain-fp8", "full int8", "pyramidal 0.25 int8", "pyramidal 256 int8"]
    assert [case.label for case in found] == labels
    plain, fp8, full, share, entries = (case.flags() for case in found)
    assert plain == ["--kv-cache-dtype", "auto"]
    assert fp8 == ["--kv-cache-dtype", "fp8"]
    assert full == ["--kv-policy", "full", "--kv-policy-config", '{"page_format": "int8"}']
    assert share[:4] == ["--kv-policy", "pyramidal", "--kv-budget", "0.25"]
    assert entries[2:6] == ["--kv-budget", "256", "--kv-start", "pressure"]
    assert found[3].budget == Fraction(1, 4)
    more = read_cases("streaming", "128", "native", "always", '{"num_sink_tokens": 8}')[0]
    assert json.loads(more.flags()[-1]) == {"num_sink_tokens": 8, "page_format": "native"}


def test_pools_are_shares_of_what_all_need_or_tokens(tiny):
    loads = read_loads(Path(tiny), [100, 200], 20, [4], [0.5, 600])
    assert [(load.input_len, load.pool_tokens) for load in loads] == [
        (100, 256),  # half of four times 128
        (100, 600),
        (200, 448),
        (200, 600),
    ]
    assert [load.share for load in loads] == [0.5, 600 / 512, 0.5, 600 / 896]


MISTAKES = {
    "--policy nope": "known are: full, .*; or a peer: plain, plain-fp8",
    "--policy plain,plain": "policy plain,plain: plain is there 2 times",
    "--policy streaming --budget 64": "budget 64 is too small: it must be at least 68",
    "--page-format int3": "page_format must be one of",
    '--policy-config {"budget":1}': "policy-config must not have budget: use --budget",
    "--input-len 2048": "needs a context of 2112 tokens .* the model has 2048",
    "--pool 100": "pool 100 has no room for one request: .* needs 192 tokens",
    "--pool 0.1": r"pool 0.1 \(64 tokens\) has no room for one request",
    "--out /proc/none/rows.jsonl": "out /proc/none/rows.jsonl: No such file",
}


@pytest.mark.parametrize("words", MISTAKES)
@pytest.mark.parametrize("command", ["throughput", "latency", "memory"])
def test_mistakes_are_found_before_anything_starts(command, words, tiny, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    line = ["bench", command, "--model", tiny, "--input-len", "100", "--output-len", "20"]
    line += ["--requests", "4", *words.split(" ")]
    assert cli.main(line) == 2
    assert re.search(MISTAKES[words], capsys.readouterr().err)


@pytest.mark.parametrize(
    ("read", "text"),
    [(arguments.pool, "0.0"), (arguments.pool, "x.5"), (arguments.pool, "0"),
        (arguments.rate, "0"), (arguments.rate, "nan"), (arguments.rate, "fast")],
)  # fmt: skip
def test_numbers_that_make_no_sense(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
        read(text)
    assert (arguments.pool("1.0"), arguments.pool("1")) == (1.0, 1)
    assert arguments.rate("inf") == math.inf


def test_the_first_error_of_a_log_is_the_reason():
    log = """INFO starting
    (EngineCore pid=7) ERROR 11-29 [core.py:1] ValueError: no fp8 here
    (APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above."""
    assert first_reason(log) == "no fp8 here"
    assert first_reason("vllm: error: kv-budget must be") == "kv-budget must be"
    assert first_reason("killed") is None


def test_servers_stay_up_if_there_is_memory():
    gib = 1 << 30
    assert serving.has_room((10 * gib, 0), (2 * gib, 0), 4)
    assert not serving.has_room((10 * gib, 0), (2 * gib, 0), 5)
    assert not serving.has_room((99 * gib, 3 * gib), (gib, 3 * gib), 1), "the GPU's is short"


def test_a_server_that_dies_says_why(monkeypatch):
    code = "import sys; print('working\\n - leaked x'); sys.exit('ValueError: no such thing')"
    monkeypatch.setattr("paged_kv.bench.server.VLLM", [sys.executable, "-c", code])
    with Server("plain-fp8", []) as server, pytest.raises(Refused) as error:
        server.wait_until_ready()
    message = "the server of plain-fp8 died (1, no such thing); it printed:\nworking\nValueError"
    assert str(error.value).startswith(message)
    assert error.value.reason == "no such thing"
    case = read_cases("plain-fp8", "256", "native", None, None)[0]
    monkeypatch.setattr(serving, "server_flags", lambda *_: [])
    message = "peer plain-fp8: vLLM refuses it: no such thing"
    with pytest.raises(ValueError, match=message), serving.ready_server(Path(), case, LOAD):
        pass


def test_nothing_of_a_server_is_left(monkeypatch):
    """Also what it has started, and if it does not end when it is asked to."""
    code = """if True:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)"""
    monkeypatch.setattr("paged_kv.bench.server.VLLM", [sys.executable, "-c", code])
    monkeypatch.setattr("paged_kv.bench.server.STOP_SECONDS", 0.5)
    before = children()
    server = Server("x", [])
    with pytest.raises(KeyboardInterrupt):
        terminated_beside(server)
    assert children() == before
    assert server._processes() == []


def terminated_beside(server: Server) -> None:
    with serving.ended_by_sigterm(), server:
        while len(server._processes()) < 2:
            server.check()
        assert server.memory_bytes() > 0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_of_real_servers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    out, before = tmp_path / "new" / "rows.jsonl", children()
    line = ["bench", "throughput", "--model", tiny, "--policy", "plain,streaming"]
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)  # the tiny model is done within seconds
    # For several seconds: a busy server answers late when it is asked how many it is running.
    line += ["--budget", "96", "--requests", "18", "--input-len", "96", "--output-len", "416"]
    line += ["--pool", "0.75", "--rounds", "1", "--out", str(out)]
    assert cli.main(line) == 0
    assert children() == before
    plain, streaming = results.read([out])
    assert (plain["policy"], plain["kept"]) == ("plain", 512)
    assert (streaming["policy"], streaming["kept"]) == ("streaming", 96)
    for row in (plain, streaming):
        assert row["task"] == "throughput"
        assert row["prompt_tokens"] == 18 * 96
        assert row["tpot_ms"] > 0
        assert 0 <= row["itl_ms"] <= row["itl_p99_ms"]
        assert 0 < row["ttft_ms"] <= row["ttft_p99_ms"]
        assert 1 <= row["running"] <= 18
        assert row["seconds"] * row["score"] == pytest.approx(18 * 416, rel=0.05)
        assert 0 <= row["idle_cpu"] < 0.3
    assert plain["preemptions"] > 0, "three quarters of what they need"
    assert streaming["preemptions"] == 0
    assert streaming["ratio"] == pytest.approx(streaming["score"] / plain["score"], rel=0.01)
    table, text = capsys.readouterr().out, out.read_text()
    assert [words.split()[0] for words in table.splitlines()] == ["policy", "plain", "streaming"]
    monkeypatch.setattr("subprocess.Popen", None)
    assert cli.main(line) == 0, "the same again starts nothing"
    assert (capsys.readouterr().out, out.read_text()) == (table, text)
    assert not out.with_name("rows.jsonl.partial").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_requests_arrive_at_a_rate(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    out = tmp_path / "rows.jsonl"
    line = ["bench", "latency", "--model", tiny, "--policy", "plain", "--request-rate", "2,inf"]
    line += ["--requests", "6", "--input-len", "32", "--output-len", "8", "--pool", "1.0"]
    assert cli.main([*line, "--rounds", "1", "--out", str(out)]) == 0
    spread, at_once = results.read([out])
    assert (spread["request_rate"], at_once["request_rate"]) == (2.0, "inf")
    assert spread["seconds"] > 2, "the last comes after three seconds"
    assert at_once["seconds"] < spread["seconds"]
    for row in (spread, at_once):
        assert (row["task"], row["metric"]) == ("latency", "itl_ms")
        assert row["score"] == pytest.approx(row["itl_ms"], abs=0.01)
        # A busy server sends several tokens at once: then most come right after another.
        assert 0 <= row["itl_ms"] <= row["itl_p99_ms"] > 0
