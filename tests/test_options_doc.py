"""The tables of options in docs/ are what the options say of themselves; so is the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from paged_kv import cli, registry
from paged_kv.option_table import OPTIONS

DOCS = Path(__file__).parent.parent / "docs"
HEAD = "| {} | default | meaning |\n| --- | --- | --- |\n"


def document(name: str) -> str:
    """Which document has an option."""
    if name.startswith("swap_"):
        return "swap.md"
    return "policies.md" if name.startswith("spill") or name == "fetch_limit" else "vllm.md"


def table(file: str) -> str:
    """The table that a document must have."""
    names = [name for name in OPTIONS if document(name) == file]
    shown = {name: name for name in names}
    if file == "swap.md":
        shown = {name: f"--kv-{name.replace('_', '-')}" for name in names}
    rows = [
        f"| `{shown[name]}` | {OPTIONS[name].shown_default} | {OPTIONS[name].help} |\n"
        for name in names
    ]
    return HEAD.format("option") + "".join(rows)


@pytest.mark.parametrize("file", ["vllm.md", "swap.md", "policies.md"])
def test_tables_in_the_documents(file):
    wanted = table(file)
    assert wanted in (DOCS / file).read_text(), f"docs/{file} must have this table:\n\n{wanted}"
    assert max(map(len, wanted.splitlines())) <= 100


def test_every_option_has_a_line_of_help():
    every = {name: registry.load(name).options for name in registry.available() if known(name)}
    for policy, options in {"": OPTIONS, **every}.items():
        for name, option in options.items():
            assert option.help, f"{policy} {name}"
            assert not option.help.endswith("."), f"{policy} {name}"


def known(name: str) -> bool:
    return name not in (registry.FULL, registry.PYRAMIDAL)


def test_policies_have_what_their_table_says():
    """Names and defaults; of a choice all names, the default first."""
    text = (DOCS / "policies.md").read_text()
    rows = [line.split(" | ") for line in text[: text.index("\n## ")].splitlines() if "|" in line]
    said = {row[0].strip("| `"): row[2] for row in rows if row[0].strip("| `") in every_policy()}
    assert set(said) == every_policy()
    for policy, cell in said.items():
        for name, option in registry.load(policy).options.items():
            default = "" if name == "weights" else f" {option.shown_default}"
            assert f"{name}{default.removesuffix('.0')}" in cell, f"{policy}: {name}{default}"


def every_policy() -> set[str]:
    return set(filter(known, registry.available()))


def test_options_are_listed(capsys):
    assert cli.main(["options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPTIONS)
    assert "newest entries, never dropped by any policy (default 32)" in lines[3]


def test_options_of_a_policy_are_listed(capsys):
    assert cli.main(["options", "pyramidal+value_merge"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["observation_window", "kernel_size", "aggregation", "of", "threshold"]
    assert cli.main(["options", "nope"]) == 2
    assert "unknown kv-policy 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("options", ""), ("policies", ""), ("--help", ""), ("options", "1")]
)
def test_a_reader_may_leave(command, unbuffered, monkeypatch):
    """As in `paged-kv options | head -1`; what is printed goes out at the end, or line by line."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    line = [sys.executable, "-m", "paged_kv.cli", command]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
