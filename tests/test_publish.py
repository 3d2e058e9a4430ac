"""What is published is what commands of today do."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from paged_kv import cli, registry
from paged_kv.core.page_formats import FORMATS
from paged_kv.eval.cases import TRUNCATE, read_cases

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "publish.py"
NAMES = runpy.run_path(str(SCRIPT))
COMMANDS = [command for commands in NAMES["RUNS"].values() for command in commands]


@pytest.fixture
def started(tmp_path):
    """Commands that would be run, and the exit code of each."""
    calls, codes = [], [0] * len(COMMANDS)
    module = runpy.run_path(str(SCRIPT))
    scope = module["main"].__globals__
    scope["RESULTS"] = tmp_path

    def run(words, **_):
        calls.append(words)
        return SimpleNamespace(returncode=codes[len(calls) - 1])

    scope["subprocess"] = SimpleNamespace(run=run)
    return module["main"], calls, codes


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tiny):
    words = command.split()
    args = cli.build_parser(words[0]).parse_args([*words, "--model", tiny])
    if words[0] != "eval" or "kvpress" in command:  # a peer wants its environment
        return
    cases = read_cases(args, Path(tiny), baselines=[TRUNCATE])
    assert len({(str(case), str(case.config.to_dict())) for case in cases}) == len(cases)
    if "page-format" in command:
        assert {case.config.page_format for case in cases} == set(FORMATS)
        return
    if command in NAMES["RUNS"]["variants"]:
        assert {case.policy for case in cases} == {NAMES["BEST"]}
        return
    assert len(cases) > 80
    assert {case.policy for case in cases} >= set(registry.available()) - {"value_merge"}


def test_one_run_after_the_other_into_a_file_of_its_own(started, tmp_path):
    main, calls, _ = started
    assert main(["--data", "."]) == 0
    assert [words[1:3] for words in calls] == [command.split()[:2] for command in COMMANDS]
    files = [f"{name}.jsonl" for name, commands in NAMES["RUNS"].items() for _ in commands]
    assert [words[-1] for words in calls] == [tmp_path / file for file in files]


def test_what_is_there_is_left_unless_named(started, tmp_path):
    main, calls, codes = started
    for name in NAMES["RUNS"]:
        (tmp_path / f"{name}.jsonl").write_text("{}")
    (tmp_path / "ruler.jsonl.partial").write_text("")  # was stopped
    assert main(["--data", "."]) == 0
    assert [words[2] for words in calls] == ["ruler"]
    calls.clear()
    codes[0] = 3
    assert main(["--data", ".", "needle", "ruler"]) == 3
    assert [words[2] for words in calls] == ["needle"]


def test_an_unknown_name(started, capsys):
    main, calls, _ = started
    with pytest.raises(SystemExit, match="2"):
        main(["--data", ".", "nope"])
    assert "NAME must be one of perplexity, peers, " in capsys.readouterr().err
    assert not calls
