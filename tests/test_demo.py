"""`paged-kv demo` at its smallest: what it prints and writes, and how mistakes look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paged_kv.bench import prompts
from paged_kv.bench.compare import equal_prefix


def run_demo(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paged_kv.cli", "demo", *args]
    # One thread: tests share the machine.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def only_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error; a progress bar may stand before it."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("paged-kv: error: ")
    return line


@pytest.fixture(scope="module")
def demo(tmp_path_factory, smollm2_dir):
    directory = tmp_path_factory.mktemp("demo")
    sizes = ["--requests", "4", "--max-tokens", "160", "--budget", "128", "--pool-tokens", "640"]
    return directory, run_demo(directory, "--model", str(smollm2_dir), *sizes)


@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.slow
def test_table(demo):
    _, result = demo
    assert result.returncode == 0, result.stderr
    header, *rows = [line for line in result.stdout.splitlines() if line]
    assert header.split() == ["plain", "vLLM", "pyramidal"]
    assert any(row.startswith("output tokens per second") for row in rows)
    assert "speed: " in result.stdout
    assert "pyramidal: 100%" in result.stderr


@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.slow
def test_json(demo):
    directory, _ = demo
    report = json.loads((directory / "results" / "demo.json").read_text())
    plain, compressed = report["engines"].values()
    assert list(report["engines"]) == ["plain vLLM", "pyramidal"]
    for figures in (plain, compressed):
        assert figures["output_tokens"] == 4 * 160
        assert 0 < figures["peak_pages"] <= figures["pool_pages"]
        assert figures["tokens_per_second"] > 0
    assert compressed["decode_sequences"] > plain["decode_sequences"]
    assert compressed["page_bytes"] * 3 == plain["page_bytes"]  # three steps: three groups
    assert 0 < report["agreement"]["share_to_first_difference"] <= 1
    for line in report["timelines"].values():
        assert len(line["seconds"]) == len(line["used_mb"]) == len(line["running"]) > 10


@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.slow
def test_png(demo):
    from matplotlib import image

    directory, _ = demo
    picture = image.imread(directory / "results" / "demo.png")
    height, width, _ = picture.shape
    assert (width, height) > (800, 400)
    assert 0.05 < picture[..., :3].std() < 0.5  # lines on white, neither blank nor black


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/model"], "model /nowhere/model: no such directory"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt"),
        (["--policy", "magic"], "unknown kv-policy 'magic'"),
        (["--budget", "many"], "budget must be"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    result = run_demo(tmp_path, *arguments)
    assert message in only_error(result)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.vllm
@pytest.mark.model
def test_refusals_of_vllm_are_one_line(tmp_path, smollm2_dir):
    result = run_demo(tmp_path, "--model", str(smollm2_dir), "--pool-tokens", "64")
    assert "KV cache" in only_error(result)


def test_prompts_differ_and_repeat_late():
    texts = prompts.built_in(50)
    assert len(set(texts[:48])) == 48
    assert texts[48:] == texts[:2]
    assert not any("{}" in text for text in texts)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two  \n")
    assert prompts.from_file(file, 3) == ["one", "two", "one"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts.from_file(file, 3)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([], [], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2)],
)
def test_equal_prefix(one, other, expected):
    assert equal_prefix(one, other) == expected
