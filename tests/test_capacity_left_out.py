"""`paged-kv capacity`: what is refused is named, and all else printed."""

from __future__ import annotations

import json

import pytest
from capacity_models import LLAMA_8B, write

from paged_kv import cli

PAIRS = ("--gpu-memory", "80GB", "--policy", "streaming,pyramidal", "--page-format", "native,int8")
BUDGETS = ("--budget", "512,1024")
REFUSED = (
    "left out: pyramidal 512 int8, pyramidal 1024 int8: page-format on a GPU with policy "
    "pyramidal, which reads the cache, must be one of native, fp8, not int8"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "Llama", LLAMA_8B)


def test_a_refused_pair_is_a_note(llama, capsys):
    assert cli.main(["capacity", "--model", llama, *PAIRS, *BUDGETS]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[6 : lines.index("", 6)]]
    assert names == ["full", *["streaming"] * 2, *["pyramidal"] * 2, "full", *["streaming"] * 2]
    assert f"* {REFUSED} *" in " ".join(line.strip() for line in lines)
    assert all(len(line) <= 100 for line in lines)


def test_a_refused_pair_is_no_json(llama, capsys):
    assert cli.main(["capacity", "--model", llama, "--json", *PAIRS, *BUDGETS]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    pairs = [(row["policy"], row["page_format"]) for row in rows]
    assert ("pyramidal", "int8") not in pairs
    assert len(pairs) == 8
    assert captured.err == f"paged-kv: {REFUSED}\n"


def test_one_policy_has_no_budget_for_so_many(llama, capsys):
    args = ("--memory", "40GiB", "--policy", "streaming,hybrid", "--sequences", "2500")
    assert cli.main(["capacity", "--model", llama, *args]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "streaming 96 native" in text
    assert "left out: hybrid native: sequences 2500: no budget of hybrid is small enough" in text


def test_full_is_what_was_asked_for(tmp_path, capsys):
    """Unlike a full that is there to be compared with."""
    changed = {"model_type": "mistral", "sliding_window": 4096}
    model = write(tmp_path / "mistral", LLAMA_8B, **changed)
    line = ["capacity", "--model", model, "--memory", "40GiB", "--page-format", "native,int8"]
    assert cli.main(line) == 0
    assert "* left out: full int8: page_format int8 does not" in capsys.readouterr().out
    assert cli.main([*line, "--policy", "streaming"]) == 2
    assert "kv-policy does not support a model without full-" in capsys.readouterr().err
