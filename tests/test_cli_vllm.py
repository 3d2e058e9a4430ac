"""vLLM's own command line with our flags: `vllm serve`, `vllm bench throughput` and `latency`.

A start of `vllm` takes 10 s, so most lines run one after the other in one process (MANY_LINES).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import servers
import tiny_models
from servers import VLLM, Server

THROUGHPUT = ["bench", "throughput", "--dataset-name", "random"]
COMMANDS = {"serve": ["serve"], "throughput": THROUGHPUT, "latency": ["bench", "latency"]}
FLAGS = ("--kv-policy", "--kv-budget", "--kv-policy-config")

# Runs `vllm ARGUMENTS` for each line of stdin (JSON); prints [exit code, stdout, stderr] of each.
MANY_LINES = """
import contextlib, io, json, sys
from vllm.entrypoints.cli.main import main
from vllm.model_executor.models import registry
from vllm.utils.argparse_utils import FlexibleArgumentParser
registry._run_in_subprocess = lambda function: function()
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), "no exit"
    sys.argv = ["vllm", *json.loads(line)]
    FlexibleArgumentParser._search_keyword = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return servers.environment(tmp_path_factory.mktemp("record"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("models")
    result = {}
    for name in ("llama", "mistral-sliding", "bert"):
        result[name] = tiny_models.config_only(name, path)
        tiny_models.save_tokenizer(Path(result[name]))
    (path / "without-weights").mkdir()
    config = Path(result["llama"], "config.json").read_bytes()
    (path / "without-weights" / "config.json").write_bytes(config)
    (path / "nothing").mkdir()
    return result | {name: str(path / name) for name in ("without-weights", "nothing")}


def arguments(command: str, model: str, *more: str) -> list[str]:
    """A command line for the model."""
    place = [model] if command == "serve" else ["--model", model]
    return [*COMMANDS[command], *place, "--enforce-eager", *more]


SPECULATIVE = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'
STREAMING = ("--kv-policy", "streaming")

# model, flags, what the one line says
MISTAKES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "unknown policy": (
        "llama",
        ("--kv-policy", "nonsense"),
        "unknown kv-policy 'nonsense'; known are: full, pyramidal,",
    ),
    "budget too small": (
        "llama",
        (*STREAMING, "--kv-budget", "67"),
        "budget 67 is too small: it must be at least 68",
    ),
    "fraction above 1": (
        "llama",
        (*STREAMING, "--kv-budget", "1.5"),
        "budget must be an integer >= 1 (at most 2147483647) or a number with a point between 0 "
        "and 1 (at least 1e-06), not '1.5'",
    ),
    "fraction 0": ("llama", (*STREAMING, "--kv-budget", "0.0"), "not '0.0'"),
    "budget no number": ("llama", (*STREAMING, "--kv-budget", "lots"), "not 'lots'"),
    "beta below 1": (
        "llama",
        ("--kv-policy", "pyramidal", "--kv-policy-config", '{"pyramid_beta": 0.5}'),
        "pyramid_beta must be a number >= 1, not 0.5",
    ),
    "beta below 1, dotted": (
        "llama",
        ("--kv-policy", "pyramidal", "--kv-policy-config.pyramid_beta", "0.5"),
        "pyramid_beta must be a number >= 1, not 0.5",
    ),
    "no JSON": (
        "llama",
        (*STREAMING, "--kv-policy-config", '{"pyramid_steps'),
        "kv-policy-config is not JSON",
    ),
    "unknown option": (
        "llama",
        (*STREAMING, "--kv-policy-config", '{"colour": 1}'),
        "unknown paged_kv option colour; known are: budget,",
    ),
    "no policy": (
        "llama",
        ("--kv-budget", "100"),
        "kv-budget, kv-start and kv-policy-config need a",
    ),
    "start": (
        "llama",
        (*STREAMING, "--kv-start", "sometimes"),
        "start must be one of always, pressure, not 'sometimes'",
    ),
    "start of nothing": (
        "llama",
        ("--kv-policy", "full", "--kv-start", "pressure"),
        "start pressure needs a policy that drops entries, not policy 'full'",
    ),
    "start and pieces": (
        "llama",
        (*STREAMING, "--kv-start", "pressure", "--kv-policy-config", '{"compress_prefill": true}'),
        "start pressure does not go with compress_prefill",
    ),
    "given twice": (
        "llama",
        (*STREAMING, "--additional-config", '{"paged_kv": {"policy": "full"}}'),
        "give either kv-policy or additional-config's paged_kv",
    ),
    "in additional-config": (
        "llama",
        ("--additional-config", '{"paged_kv": {"policy": "nonsense"}}'),
        "unknown kv-policy 'nonsense'",
    ),
    "feature": (
        "llama",
        (*STREAMING, "--speculative-config", SPECULATIVE),
        "kv-policy does not support speculative decoding",
    ),
    "model": ("mistral-sliding", STREAMING, "kv-policy does not support a model without full-"),
    "pooling model": ("bert", STREAMING, "kv-policy does not support a pooling model"),
    "swap directory": (
        "llama",
        ("--kv-swap-space", "1", "--kv-swap-dir", "/nowhere", "--kv-swap-dir-space", "1"),
        "kv-swap-dir /nowhere: cannot write there (No such file or directory)",
    ),
    "no weights": ("without-weights", STREAMING, "holds no weights (*.safetensors, "),
    "nothing": ("nothing", STREAMING, "holds no weights (*.safetensors, "),
}
# One of each kind also where the commands differ: flags, vLLM's fields, its config, the tokenizer.
EVERYWHERE = (
    "swap directory",
    "unknown policy",
    "budget too small",
    "in additional-config",
    "feature",
    "nothing",
)
CASES = [
    (mistake, command)
    for mistake in MISTAKES
    for command in COMMANDS
    if command == "serve" or mistake in EVERYWHERE
]
HELPS = [("serve", "--help=paged-kv"), ("serve", "--help=all")]
HELPS += [(*command[:2], "--help=paged_kv") for command in COMMANDS.values()]


@pytest.fixture(scope="module")
def outcomes(environment, models) -> dict[Any, Any]:
    """(exit code, stdout, stderr) of every mistake and command, and of every help line."""
    lines: dict[Any, list[str]] = {}
    for mistake, command in CASES:
        model, flags, _ = MISTAKES[mistake]
        lines[mistake, command] = arguments(command, models[model], *flags)
    lines |= {line: list(line) for line in HELPS}
    done = subprocess.run(
        [sys.executable, "-c", MANY_LINES],
        input="".join(json.dumps(line) + "\n" for line in lines.values()),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(zip(lines, results, strict=True))


def error_lines(stderr: str) -> list[str]:
    """Its lines without vLLM's own warnings, which come with or without our flags."""
    lines = stderr.strip().splitlines()
    own = ("UserWarning", "validate_args(args)", "Triton is installed", "WARNING")
    return [line for line in lines if not any(word in line for word in own)]


@pytest.mark.vllm
@pytest.mark.parametrize(("mistake", "command"), CASES)
def test_a_mistake_is_one_line_and_exit_code_2(outcomes, mistake, command):
    code, _, stderr = outcomes[mistake, command]
    assert code == 2, stderr
    (line,) = error_lines(stderr)
    assert line.startswith("vllm: error: ")
    assert MISTAKES[mistake][2] in line


@pytest.mark.vllm
@pytest.mark.parametrize("line", HELPS, ids=" ".join)
def test_help_shows_the_group(outcomes, line):
    code, stdout, _ = outcomes[line]
    assert code == 0
    group = stdout[stdout.index("paged_kv:") :]
    assert "KV-cache compression" in group
    for flag in FLAGS:
        assert f"  {flag} " in group


@pytest.mark.vllm
@pytest.mark.parametrize("command", ["serve", "latency"])
def test_a_real_process_ends_without_a_traceback(environment, models, command):
    """Refused last: vLLM's configuration has been made, in serve inside an event loop."""
    line = [VLLM, *arguments(command, models["llama"], *MISTAKES["feature"][1])]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert error_lines(done.stderr) == [f"vllm: error: {MISTAKES['feature'][2]}"]
    assert "Traceback" not in done.stdout


@pytest.mark.vllm
def test_bench_throughput_runs(environment, tiny):
    line = arguments("throughput", tiny, *STREAMING, "--kv-budget", "128")
    line += ["--num-prompts", "4", "--random-input-len", "64", "--random-output-len", "160"]
    line += ["--max-model-len", "512", "--dtype", "float32"]
    done = subprocess.run([VLLM, *line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Throughput: " in done.stdout


# ---- vllm serve


@pytest.fixture
def server(environment, smollm2_dir, tmp_path):
    flags = ["--kv-policy", "pyramidal", "--kv-budget", "256", "--num-gpu-blocks-override", "100"]
    flags += ["--kv-cache-dtype", "int8_per_token_head"]
    line = arguments("serve", str(smollm2_dir), *flags, "--dtype", "float32")
    line += ["--max-model-len", "2048", "--served-model-name", "smollm2"]
    variables = environment | {"VLLM_LOGGING_LEVEL": "INFO"}
    server = Server([VLLM, *line], variables, tmp_path / "server.log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.mark.vllm
@pytest.mark.model
def test_serve(server):
    """Several processes, as users run it; 99 pages hold a prompt of 33 pages in each of 3 steps."""
    assert len(server.processes()) > 1
    assert "paged_kv pyramidal keeps: layers 0-9: " in server.log.read_text()
    assert "paged_kv page formats: 30 x int8" in server.log.read_text()

    request = {"model": "smollm2", "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    status, answer = server.post("/v1/completions", request | {"prompt": "Once upon a time"})
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 64
    assert answer["choices"][0]["text"].strip()

    status, _ = server.post("/v1/completions", request | {"prompt": [5] * 1056})
    assert status == 200
    status, answer = server.post("/v1/completions", request | {"prompt": [5] * 1057})
    assert status == 400
    assert "the prompt has 1057 tokens, but the KV cache holds prompts of at most 1056" in str(
        answer
    )

    metrics = server.get("/metrics")
    assert 'vllm:generation_tokens_total{engine="0",model_name="smollm2"} 128.0' in metrics
    # Before it ends: when the engine's process is the first to go, vLLM logs that it is dead.
    assert "Traceback" not in server.log.read_text()

    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    deadline = time.monotonic() + 20
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.processes() == []
