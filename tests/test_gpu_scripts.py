"""The scripts of the GPU run (benchmarks/gpu), as far as a CPU can run them: tiny, in Triton's
interpreter, with vLLM for CPUs. No figure of theirs means anything here; their lines, exit codes
and clocks do."""

from __future__ import annotations

import re
import runpy
import time
from pathlib import Path
from typing import Any

import prune_cases
import pytest
import torch
from gpu_scripts import SCRIPTS, lines_of, run

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and vLLM")

README = (SCRIPTS / "README.md").read_text()

ALL = {"part", "case", "ok", "seed", "device", "versions"}
TIMES = {"ms", "eager_ms", "sets", "took_s"}
MOVED = {"bytes", "gb_per_s", "bandwidth_share", "error"}
SIZE = {"sequences", "entries", "heads", "kv_heads", "head_dim"}
# The first word of a case -> fields of its line, beside those that all have.
FIELDS = {
    "kernels_right": {
        "test_cases_meet_every_way": {"took_s"},
        "test_store_move_gather": {"took_s"},
    },
    "kernels_fast": {
        "copy": TIMES - {"sets"} | {"gb_per_s"},
        "fa3": {"skipped"},
        "sdpa": TIMES | SIZE,
        "decode": TIMES | MOVED | SIZE | {"format", "fa3_ratio", "sdpa_ratio"},
        "scores": TIMES | MOVED | SIZE | {"format", "scores_ratio"},
        "write": TIMES | MOVED | {"format", "tokens"},
        "move": TIMES | MOVED | {"format", "layers", "pages"},
        "observe": TIMES | MOVED | {"sequences", "entries"},
    },
    "hf_speed": {
        "read": {"tokens", "caches", "took_s"},
        "full": {"policy", "budget", "tokens", "layers", "ratio", "ratios", "paged_bytes"}
        | {f"{cache}_{what}" for cache in ("dynamic", "paged") for what in ("ms", "torch_bytes")},
    },
    "vllm_runs": {
        "prefix": {"kind", "policy", "pool", "mode", "asked_runner", "runner", "backend"}
        | {"cudagraph_mode", "tokens_per_second", "seconds", "start_s", "pool_pages"}
        | {"peak_running", "preemptions", "computed_tokens", "prefix_hits", "different"}
    },
}
FIELDS["hf_speed"]["streaming"] = FIELDS["hf_speed"]["full"]
OTHERS = {
    "same_tokens",
    "eager_tokens",
    "same_waits",
    "waits",
    "steps",
    "drops",
    "ties",
    "logprob_error",
    "wanted",
    "met",
    "killed",
}
OTHERS |= {"graph_error", "exit_code", "lines", "failed"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    """(what run_all says, the lines of all parts, the folder) of everything at its smallest."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    done = run(SCRIPTS / "run_all.py", "--device", "cpu", "--out", str(out), "--seconds", "1200")
    logs = "".join(file.read_text()[-2000:] for file in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return lines_of(done.stdout), lines_of((out / "lines.jsonl").read_text()), out


@pytest.mark.vllm
@pytest.mark.slow
def test_every_part_runs(trial):
    told, lines, out = trial
    *parts, summary = told
    skipped = {"memcheck", "racecheck"}
    assert {line["part"] for line in parts} == {*FIELDS, *skipped}
    for line in parts:
        assert line["ok"] is (None if line["part"] in skipped else True), line
    assert summary.pop("seconds") > 0
    assert summary == {
        "part": "run_all",
        "ok": True,
        "failed": [],
        "skipped": ["memcheck", "racecheck"],
    }
    assert {file.stem for file in out.glob("*.log")} == set(FIELDS)
    seen = set()
    for line in lines:
        word = re.split(r"[ \[]", line["case"])[0]
        seen.add((line["part"], word))
        assert set(line) == ALL | FIELDS[line["part"]][word], line
        assert line["ok"] is (None if "skipped" in line else True)
        assert {"torch", "triton", "transformers", "vllm"} <= set(line["versions"])
    assert seen == {(part, word) for part, words in FIELDS.items() for word in words}


def test_the_readme_documents_the_fields():
    names = ALL | OTHERS | {"skipped"}
    names = names.union(*(fields for words in FIELDS.values() for fields in words.values()))
    assert [name for name in sorted(names) if f"`{name}`" not in README] == []
    for script in SCRIPTS.glob("*.py"):
        assert f"`{script.name}`" in README


# ---- what is wrong fails


def test_a_wrong_kernel_fails():
    done = run(
        SCRIPTS / "kernels_right.py",
        *("--device", "cpu", "--select", "cases_meet_every_way or one_block"),
        code="import paged_kv.kernels.triton as t; t.move = lambda *operands: None",
    )
    assert done.returncode == 1
    right, wrong = sorted(lines_of(done.stdout), key=lambda line: not line["ok"])
    assert (right["case"], right["ok"]) == ("test_cases_meet_every_way", True)
    assert (wrong["case"], wrong["ok"]) == ("test_entries_of_one_block", False)
    assert "assert" in wrong["error"]


SMALL = "--device cpu --sequences 1 --entries 20 --heads 2 --kv-heads 1 --head-dim 16 --copy-mb 1"
SMALL += " --formats native --write-tokens 2 --move-layers 1 --move-pages 2 --rounds 1"


def test_a_wrong_result_is_not_timed():
    """Outputs that nobody wrote, a reference that is another one, and a kernel that raises."""
    done = run(
        SCRIPTS / "kernels_fast.py",
        *SMALL.split(),
        code="import paged_kv.kernels.triton as t; from paged_kv.kernels import packed_reference; "
        "t.attend = lambda *operands: None; packed_reference.move = lambda *operands: None; "
        "t.attention_mass = None",
    )
    assert done.returncode == 1
    lines = {line["case"].split()[0]: line for line in lines_of(done.stdout)}
    assert {case for case, line in lines.items() if line["ok"] is False} == {
        *("decode", "scores", "move", "observe")
    }
    assert lines["decode"]["error"] == "ValueError: the result is wrong: relative error inf"
    assert "TypeError" in lines["observe"]["error"]
    assert "ms" not in lines["move"]


def test_no_test_is_a_failure():
    done = run(SCRIPTS / "kernels_right.py", "--device", "cpu", "--select", "nothing_is_called_so")
    assert done.returncode == 1
    (line,) = lines_of(done.stdout)
    assert line["error"] == "0 tests, exit code 5"


def test_a_case_that_is_not_there():
    done = run(SCRIPTS / "vllm_runs.py", "--cases", "speed v3")
    assert done.returncode == 2
    assert "--cases ['speed v3']: no case has these words" in done.stderr


# ---- the time is kept


def test_cases_that_would_begin_too_late_are_skipped():
    done = run(SCRIPTS / "kernels_fast.py", *SMALL.split(), "--seconds", "0")
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert len(lines) == 8
    assert all(line["ok"] is None and line["skipped"] for line in lines)


def test_tests_that_would_begin_too_late_are_skipped(monkeypatch, request):
    setup = runpy.run_path(str(SCRIPTS / "kernel_session.py"))["pytest_runtest_setup"]
    monkeypatch.setenv("PAGED_KV_SEED", "5")
    monkeypatch.setenv("PAGED_KV_END", str(time.time() + 60))
    first, second = (setup(request.node) or torch.rand(3) for _ in range(2))
    assert torch.equal(first, second)
    monkeypatch.setenv("PAGED_KV_SEED", "6")
    setup(request.node)
    assert not torch.equal(torch.rand(3), first)
    monkeypatch.setenv("PAGED_KV_END", str(time.time()))
    with pytest.raises(pytest.skip.Exception, match="the time is up"):
        setup(request.node)


# ---- the other kinds of vLLM's cases


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "kind", ["tokens", "chunked", "reference", "profile", "speed", "preempted"]
)
def test_vllm_cases(kind):
    done = run(SCRIPTS / "vllm_runs.py", "--device", "cpu", "--small", "--at-once", "1",
               "--cases", kind)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for line in lines_of(done.stdout):
        assert line["ok"], line


# ---- the bundle


def test_blanked_code(tmp_path):
    """Machine code for sm_90 stays; where there is none, the newest PTX up to it."""
    original, kept = prune_cases.shared_object()
    (tmp_path / "in.so").write_bytes(original)
    done = run(SCRIPTS / "prune_so.py", str(tmp_path / "in.so"), str(tmp_path / "out.so"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.so").read_bytes() == kept
