"""docs/operating.md: every command runs, and every warning that a server can log is explained."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import servers
import tiny_models

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "operating.md").read_text()
COMMANDS = re.findall(r"^    (.+)$", TEXT.replace("\\\n", ""), re.MULTILINE)
SERVE = [line for line in COMMANDS if "vllm serve" in line]
# Those of transformers' users are not in a server's log.
SOURCES = [path for path in (ROOT / "paged_kv").rglob("*.py") if "hf" not in path.parts]


def run(line: str, variables: dict[str, str]) -> str:
    """What a command prints, run as a shell does it."""
    found = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def environment(directory: Path) -> dict[str, str]:
    variables = servers.environment(directory)
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return variables


@pytest.mark.model
def test_the_budget_is_chosen_as_it_says(smollm2_dir, tmp_path):
    lines = [line for line in COMMANDS if line.startswith("paged-kv capacity")]
    assert len(lines) == 2
    variables = environment(tmp_path)
    for line in lines:
        text = run(line.replace("MODEL", str(smollm2_dir)), variables)
        assert "pyramidal" in text


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("line", SERVE)
def test_servers_start_and_are_watched_as_it_says(line, tmp_path):
    model = tiny_models.saved("llama", tmp_path / "model", tokenizer=True)
    variables = environment(tmp_path)
    words = shlex.split(line.replace("MODEL", str(model)))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    line = [*words, "--enforce-eager", "--max-model-len", "2048"]
    server = servers.Server(line, variables, tmp_path / "log")
    has_policy = "--kv-policy" in words
    try:
        server.wait_until_ready()
        for command in COMMANDS:
            if "http://localhost:8000" not in command:
                continue
            command = command.replace("http://localhost:8000", server.url)
            if command.startswith("paged-kv top"):
                command += " --once"
            if has_policy:
                assert "pages" in run(command, variables)
        assert ("vllm:paged_kv_pool_pages" in server.get("/metrics")) == has_policy
    finally:
        server.kill()


def test_every_command_is_one_of_these():
    for line in COMMANDS:
        known = ("paged-kv capacity", "paged-kv top", "curl -s http://localhost:8000/metrics")
        assert line in SERVE or line.startswith(known), f"nothing runs {line}"
    assert len(SERVE) == 3


def warnings_of(path: Path) -> list[str]:
    """How each warning in a module begins: some words that are the same in all cases."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if node.func.attr in ("warning", "warning_once", "warn"):
            parts = [
                part.value
                for part in ast.walk(node.args[0])
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            pieces = [piece.split() for part in parts for piece in re.split(r"%[sd]|; |: ", part)]
            found += [" ".join(words[:5]) for words in pieces if len(words) > 2][:1]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_warning_is_explained(path):
    explained = " ".join(TEXT.split())
    for text in warnings_of(path):
        assert text in explained, f"{text!r} is in no table"


def test_warnings_are_found():
    assert sum(len(warnings_of(path)) for path in SOURCES) >= 9
