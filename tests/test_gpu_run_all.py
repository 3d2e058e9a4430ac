"""benchmarks/gpu/run_all.py with parts, and vllm_runs.py with engines, that are made up; timing.py
with a made-up GPU: what hangs, crashes, fails or is too late."""

from __future__ import annotations

import runpy
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from gpu_scripts import SCRIPTS, lines_of, run

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and vLLM")

GOOD = """
import json, sys
print(json.dumps({"case": "one", "ok": True, "argv": sys.argv[1:], "x": 1.5,
                  "wanted": {"x": ">= 2", "y": "<= 1"}, "met": {"x": False, "y": None}}))
"""
FAKES = {
    "kernels_right": 'import os; print(\'words\'); print(\'{"case": "before", "ok": true}\', '
    "flush=True); os.abort()",
    "kernels_fast": "import time; time.sleep(60)",
    "vllm_runs": 'print(\'{"case": "bad", "ok": false, "error": "why"}\')',
    "hf_speed": textwrap.dedent(GOOD),
}


def test_parts_that_crash_hang_or_fail_are_told_and_others_go_on(tmp_path):
    for name, text in FAKES.items():
        (tmp_path / f"{name}.py").write_text(text)
    done = run(
        SCRIPTS / "run_all.py",
        *("--device", "cpu", "--scripts", str(tmp_path), "--out", str(tmp_path / "out")),
        *("--seconds", "18", "--grace", "0.5", "--seed", "7", "--hf-speed=--more 'a b'"),
        *("--parts", "kernels_right", "vllm_runs", "kernels_fast", "hf_speed"),
    )
    assert done.returncode == 1
    *parts, summary = lines_of(done.stdout)
    crashed, failed, hung, good = parts
    assert (crashed["ok"], crashed["exit_code"], crashed["lines"]) == (False, -6, 1)
    assert "words" in (tmp_path / "out" / "kernels_right.log").read_text()
    assert failed["failed"] == [{"case": "bad", "error": "why"}]
    assert (hung["ok"], hung["killed"], hung["lines"]) == (False, True, 0)
    assert 5 < hung["seconds"] < 12  # four sevenths of what is left of the 18 seconds
    assert good["ok"] is True
    assert summary["failed"] == ["kernels_right", "vllm_runs", "kernels_fast"]
    lines = lines_of((tmp_path / "out" / "lines.jsonl").read_text())
    assert [line["part"] for line in lines] == ["kernels_right", "vllm_runs", "hf_speed"]
    told = dict(zip(lines[-1]["argv"][::2], lines[-1]["argv"][1::2], strict=False))
    assert (told["--seed"], told["--device"]) == ("7", "cpu")
    assert lines[-1]["argv"][-2:] == ["--more", "a b"]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("hf_speed")]
    assert table == [
        ["hf_speed:", "one", "x", ">=", "2", "1.5", "MISSED"],
        ["hf_speed:", "one", "y", "<=", "1", "None", "not", "measured"],
    ]


def test_parts_that_would_begin_too_late_are_skipped(tmp_path):
    done = run(SCRIPTS / "run_all.py", "--seconds", "1", "--out", str(tmp_path))
    assert done.returncode == 0
    *parts, summary = lines_of(done.stdout)
    assert {line["skipped"] for line in parts} == {"the time is up"}
    assert summary["skipped"] == [line["part"] for line in parts]
    assert list(tmp_path.glob("*.log")) == []


# ---- engines

FAKE_CHILD = """
import json, pathlib, subprocess, types

def child(command, timeout, **options):
    case = json.loads(command[command.index("--case") + 1])
    tokens = pathlib.Path(command[command.index("--tokens") + 1])
    policy = case["policy"]
    tokens.write_text(json.dumps([[[1, 2], [3, 4 if policy != "unreached" else 5]]]))
    if policy == "snapkv":
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"so far")
    if policy == "pyramidal":
        return types.SimpleNamespace(returncode=-9, stdout="RESULT {}", stderr="a\\nb")
    fields = {"tokens_per_second": {"plain": 10.0, "streaming": 21.0}.get(policy, 15.0)}
    if case["kind"] == "profile":
        waits = {"Memcpy DtoH": 10 + (5 if policy == "streaming" else 4)}
        fields = {"steps": 10, "waits": waits if policy != "plain" else {"Memcpy DtoH": 10}}
    return types.SimpleNamespace(returncode=0, stdout="RESULT " + json.dumps(fields), stderr="")

subprocess.run = child
"""


def test_vllm_is_compared_with_plain_vllm():
    """The children are made up: other tokens, other waits, one that dies, one that hangs."""
    done = run(
        SCRIPTS / "vllm_runs.py",
        *("--device", "cpu", "--small", "--cases", "tokens", "profile", "speed tight"),
        code=f"exec({FAKE_CHILD!r})",
    )
    assert done.returncode == 1, done.stderr
    lines = {line["case"]: line for line in lines_of(done.stdout)}
    again = lines["tokens plain_again v1 eager ample"]
    assert (again["ok"], again["same_tokens"], again["ratio"]) == (True, 1.0, 1.5)
    other = lines["tokens unreached v1 eager ample"]
    assert (other["ok"], other["same_tokens"]) == (False, 0.75)
    assert other["error"] == "75.00% of the tokens are plain's, not 100.00%"
    assert lines["profile unreached v1 eager ample"]["same_waits"] is True
    waiting = lines["profile streaming v1 eager ample"]
    assert (waiting["ok"], waiting["same_waits"]) == (False, False)
    assert waiting["error"] == "waits more often than plain vLLM: {'Memcpy DtoH': 5}"
    assert lines["speed snapkv v1 eager tight"]["error"] == "the time was up while it ran"
    assert lines["speed pyramidal v1 eager tight"]["error"] == "exit code -9: a | b"
    tight = lines["speed streaming v1 eager tight"]
    assert (tight["ratio"], tight["wanted"], tight["met"]) == (
        *(2.1, {"ratio": ">= 2.0"}, {"ratio": True}),
    )
    missed = lines["speed pyramidal+streaming v1 eager tight"]
    assert (missed["ok"], missed["met"]) == (True, {"ratio": False})
    assert "wanted" not in lines["speed plain v1 eager tight"]


def test_where_plain_vllm_differs_from_itself_nobody_need_be_the_same():
    differs = 'policy not in ("unreached", "plain_again")'
    other = FAKE_CHILD.replace('policy != "unreached"', differs)
    assert other != FAKE_CHILD
    done = run(
        SCRIPTS / "vllm_runs.py",
        *("--device", "cpu", "--small", "--cases", "tokens"),
        code=f"exec({other!r})",
    )
    assert done.returncode == 1, done.stderr
    lines = {line["case"].split()[1]: line for line in lines_of(done.stdout)}
    assert lines["plain_again"]["error"] == "75.00% of the tokens are plain's, not 100.00%"
    assert (lines["unreached"]["ok"], lines["unreached"]["same_tokens"]) == (True, 0.75)


# ---- times


class MadeUpGpu:
    """torch.cuda as far as timing.py uses it: each call takes 2 ms, launched in a graph 1 ms."""

    def __init__(self, captures: bool) -> None:
        self.now, self.step, self.captures, self.recording = 0.0, 2.0, captures, 0
        self.calls: list[int] = []

    def call(self, number: int) -> None:
        self.calls.append(number)
        if self.recording:
            self.recording += 1
        else:
            self.now += self.step

    def Event(self, enable_timing: bool) -> Any:
        event = types.SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def CUDAGraph(self) -> Any:
        self.recorded = 0
        return types.SimpleNamespace(replay=lambda: setattr(self, "now", self.now + self.recorded))

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        if not self.captures:
            raise RuntimeError("not permitted\nwhen capturing")
        self.recording = 1
        yield
        self.recorded, self.recording = self.recording - 1, 0

    def synchronize(self) -> None:
        pass

    def get_device_properties(self, device: int) -> Any:
        return types.SimpleNamespace(L2_cache_size=1000)


@pytest.mark.parametrize("captures", [True, False])
def test_times_on_a_gpu(captures, monkeypatch):
    timing = runpy.run_path(str(SCRIPTS / "timing.py"))
    gpu = MadeUpGpu(captures)
    for name in ("Event", "CUDAGraph", "graph", "synchronize", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    calls = [partial(gpu.call, number) for number in range(3)]
    found = timing["measure"](calls, "cuda", 5)
    assert gpu.calls[:9] == 3 * [0, 1, 2], "they take turns"
    if captures:
        assert found.fields() == {"ms": 1.0, "eager_ms": 2.0}
    else:
        assert found.fields() == {"ms": 2.0, "eager_ms": 2.0, "graph_error": "not permitted"}
    sets = [timing["num_sets"](num_bytes, "cuda") for num_bytes in (1, 1500, 4000, 1 << 40)]
    assert sets == [4000, 3, 1, 1]


def test_a_sanitizer_that_is_kept_out_or_cut_short_fails_nothing():
    made = runpy.run_path(str(SCRIPTS / "run_all.py"))["Outcome"]
    good, bad = {"case": "x", "ok": True}, {"case": "x", "ok": False}
    for sanitizer, killed, lines, ok in [
        ("memcheck", True, [good], None),
        ("memcheck", True, [bad], False),
        ("memcheck", False, [good], True),
        ("memcheck", False, [], False),
        (None, True, [good], False),
    ]:
        found = made(sanitizer)
        found.killed, found.lines = killed, lines
        assert found.ok is ok
    kept_out = made("memcheck")
    kept_out.exit_code, kept_out.unsupported = 9, True
    assert kept_out.ok is None
