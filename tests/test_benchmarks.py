"""Every script in benchmarks/ at its smallest: JSON lines with the documented fields."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

COMPARED = {"tokens_per_second", "baseline_tokens_per_second", "ratio", "ratios"}
COMPARED |= {"cpu_ratio", "idle_cpu"}
PRESSURE = {"peak_running", "peak_pages", "preemptions"}
PRESSURE |= {f"baseline_{name}" for name in PRESSURE}
COST = {
    f"{part}_{figure}"
    for part in ("shift", "compact")
    for figure in ("share", "calls_per_step", "us_per_call")
}

KERNELS = ["decode", "scores", "write"] * 4  # for each page format

# script -> (arguments, cases in the order of the lines, fields)
PARTS = ("key", "value")
FORMATS = [
    "int8",
    "int4",
    "fp8",
    "4 bits, symmetric",
    "4 bits, minimum",
    "4 bits, minimum, 2 groups",
    "4 bits, rotated, symmetric",
    "4 bits, rotated, minimum",
    "4 bits, rotated, minimum, 2 groups, searched",
    "4 bits, rotated, Gaussian levels",
    "8 bits, symmetric",
]
SPILL_COST = ("step_ms", "cost", "costs")
SCRIPTS = {
    "ample_pool": (
        "--rounds 2 --requests 2 --prompt-len 16 --output-len 8 --cases streaming",
        ["streaming"],
        COMPARED,
    ),
    "tight_pool": (
        "--rounds 1 --requests 4 --prompt-len 32 --output-len 160 --pool-tokens 512 --budget 128 "
        "--cases pyramidal+streaming",
        ["pyramidal+streaming"],
        COMPARED | PRESSURE,
    ),
    "pool_sweep": (
        "--requests 2 --prompt-len 32 --output-lens 32 --shares 1.5 --budget 128",
        ["streaming"],
        COMPARED | PRESSURE | {"share", "output_len", "pool_tokens"},
    ),
    "elastic": (
        "--requests 4 --prompt-len 32 --output-len 160 --shares 0.8 --budget 128 "
        "--policy streaming --swap-space 0.05",
        ["always", "pressure", "swap"],
        COMPARED | PRESSURE | {"share", "pool_tokens", "lost", "divergence"},
    ),
    "divergence": (
        "--requests 3 --output-len 40 --budget 128 --max-len 512 --pool-tokens 1024 "
        "--policy streaming",
        ["full", "always", "pressure"],
        {"divergence", "standard_error", "shrunk"},
    ),
    "shared_prefix": (
        "--rounds 1 --requests 2 --prefix-len 256 --output-len 4 --budget 128 --cases streaming",
        ["streaming"],
        COMPARED | {"hit_rate", "baseline_hit_rate"},
    ),
    "compaction_cost": (
        "--cycles 1 --budgets 128 --batches 1 2 --cases pyramidal+streaming",
        ["pyramidal+streaming", "pyramidal+streaming"],
        COST | {"budget", "batch", "step_ms", "share"},
    ),
    "spill_cost": (
        "--rounds 1 --cycles 1 --prompt-len 192 --budget 128 --batches 1 2 --cases streaming",
        ["streaming", "streaming"],
        {"batch", "baseline_step_ms", "baseline_cpu_step_ms"}
        | {f"{cpu}{name}" for cpu in ("", "cpu_") for name in SPILL_COST},
    ),
    "format_error": (
        "--tokens 64",
        FORMATS,
        {"bits", "tokens"} | {f"{worst}{part}_error" for worst in ("", "worst_") for part in PARTS},
    ),
    "hf_attention": (
        "--rounds 1 --context 64 --batches 2",
        ["runs", "scattered"],
        {"dtype", "batch", "tokens", "dynamic_ms", "sdpa_ms", "flex_ms", "ratio", "ratios"},
    ),
    "hf_decode": (
        "--rounds 1 --dtypes float32 --batches 2 --context 64 --long-context 600 "
        "--policies streaming snapkv",
        ["full", "budget", "budget"],
        {"policy", "dtype", "batch", "tokens", "dynamic_ms", "paged_ms", "ratio", "ratios"}
        | {"paged_bytes", "dynamic_torch_bytes", "paged_torch_bytes"},
    ),
    "hf_batch": (
        "--rounds 1 --requests 3 --longest 40 --output-len 4 --cases full streaming",
        ["full", "streaming"],
        COMPARED - {"idle_cpu"},
    ),
    "kernels": (
        "--json --rounds 1 --entries 64",
        2 * KERNELS + 2 * ["prefill"] * 4,
        {"op", "format", "sequences", "entries", "heads", "kv_heads", "head_dim", "tokens"}
        | {"ours_ms", "vllm_ms", "ratio", "gb_per_s", "read_gb_per_s"},
    ),
    "quantized_decode": (
        "--rounds 2 --steps 2 --requests 2 --prompt-len 40 --cases int8",
        ["plain", "int8"],
        {"tokens_per_second", "ratio", "ratios", "step_ms", "attention_ms", "write_ms"},
    ),
    "swap": (
        "--rounds 1 --requests 6 --prompt-len 128 --output-len 32 --preempt-every 12 "
        "--swap-space 0.05 --cases preempted",
        ["preempted"],
        COMPARED | PRESSURE | {"computed_tokens", "baseline_computed_tokens"},
    ),
    "swap_soak": (  # it fails when something is lost
        "--minutes 1",
        ["full", "streaming"],
        {"steps", "requests", "aborts", "resets", "compared", "near_ties", "different"}
        | {"swapped_out", "swapped_in", "demoted", "promoted", "fallbacks"}
        | {"pages_left", "slots_left", "requests_left", "files_left"}
        | {"resident_mb", "mb_per_minute"},
    ),
    "same_process": (
        "--rounds 1 --requests 2 --prompt-len 16 --output-len 8",
        ["streaming"],
        {"against", "ratio", "ratios"},
    ),
}


def run_script(name: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    # One thread: tests share the machine.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_prints_the_documented_lines(name, tmp_path, tiny):
    arguments, cases, fields = SCRIPTS[name]
    result = run_script(name, tmp_path, "--model", tiny, *arguments.split())
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["case"] for line in lines] == cases
    for line in lines:
        assert line["benchmark"] == name
        assert set(line) == fields | {"benchmark", "case", "settings"}
        assert line["settings"]["model"] == tiny
    assert (tmp_path / "results" / "pool_sweep.png").exists() == (name == "pool_sweep")


@pytest.mark.exhaustive
def test_swap_loses_nothing_in_three_minutes(tmp_path, tiny):
    """Its bound on the memory that grows is for runs that are not short."""
    result = run_script("swap_soak", tmp_path, "--model", tiny, "--minutes", "3")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_script_is_here():
    others = {"publish", "tables"}  # test_tables.py, test_publish.py
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == set(SCRIPTS) | others


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_documents_script_and_fields(name):
    readme = (BENCHMARKS / "README.md").read_text()
    assert f"{name}.py" in readme
    _, _, fields = SCRIPTS[name]
    assert not [field for field in fields if f"`{field}`" not in readme]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    """In this process: sixteen times torch and transformers take half a minute to import."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path):
    result = run_script("tight_pool", tmp_path, "--model", "/nowhere/model")
    assert result.returncode == 2
    assert result.stderr == "tight_pool.py: error: model /nowhere/model: no such directory\n"
