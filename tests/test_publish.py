"""What is published is what commands of today do."""

import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from paged_kv import cli, registry, results
from paged_kv.core.page_formats import FORMATS
from paged_kv.eval.cases import TRUNCATE, read_cases

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "publish.py"
NAMES = runpy.run_path(str(SCRIPT))
RUNS = NAMES["RUNS"]
COMMANDS = [command for commands in RUNS.values() for command in commands]


@pytest.fixture
def started(tmp_path):
    """Commands that would be run, and the exit code of each."""
    calls, codes = [], [0] * len(COMMANDS)
    module = runpy.run_path(str(SCRIPT))
    scope = module["main"].__globals__
    scope["RESULTS"] = tmp_path

    def run(words, **_):
        calls.append(words)
        code = codes[len(calls) - 1]
        if not code:
            add(words[-1], shlex.join(["paged-kv", *words[1:-2]]))
        return SimpleNamespace(returncode=code)

    scope["subprocess"] = SimpleNamespace(run=run)
    return module["main"], calls, codes


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tiny):
    words = command.split()
    args = cli.build_parser(words[0]).parse_args([*words, "--model", tiny])
    if words[0] != "eval" or command in RUNS["peers"]:  # a peer wants its environment
        return
    cases = read_cases(args, Path(tiny), baselines=[TRUNCATE])
    assert len({(str(case), str(case.config.to_dict())) for case in cases}) == len(cases)
    if "page-format" in command:
        assert {case.config.page_format for case in cases} == set(FORMATS)
        return
    if command in RUNS["variants"]:
        assert {case.policy for case in cases} <= {"full", NAMES["BEST"], "value_merge"}
        return
    assert len(cases) > 80
    assert {case.policy for case in cases} >= set(registry.available()) - {"value_merge"}


def test_one_run_after_the_other_into_a_file_of_its_own(started, tmp_path):
    main, calls, _ = started
    assert main(["--data", "."]) == 0
    assert [words[1:3] for words in calls] == [command.split()[:2] for command in COMMANDS]
    files = [f"{name}.jsonl" for name, commands in RUNS.items() for _ in commands]
    assert [words[-1] for words in calls] == [tmp_path / file for file in files]


def add(file, command):
    """A row that such a command could have written."""
    results.append(file, {**dict.fromkeys(results.FIELDS), "command": command})


def commands_in(file):
    return [row["command"].split()[1:] for row in results.read([file])]


def test_what_is_there_is_left_unless_named(started, tmp_path):
    main, calls, codes = started
    assert main(["--data", "."]) == 0
    calls.clear()
    assert main(["--data", "."]) == 0
    assert not calls
    assert main(["--data", ".", "ruler", "needle"]) == 0
    assert [words[2] for words in calls] == ["ruler", "needle", "needle"]
    assert commands_in(tmp_path / "ruler.jsonl") == [RUNS["ruler"][0].split()], "made anew"
    calls.clear()
    codes[0] = 3
    assert main(["--data", ".", "needle", "ruler"]) == 3
    assert [words[2] for words in calls] == ["needle"]


def test_a_run_that_was_stopped_goes_on_with_its_next_command(started, tmp_path):
    main, calls, codes = started
    codes[1] = 130
    assert main(["--data", ".", "perplexity"]) == 130
    calls.clear()
    codes[1] = 0
    assert main(["--data", ".", "perplexity"]) == 0
    assert [words[4] for words in calls] == ["american_adventures.txt", "news_from_nowhere.txt"]
    file = tmp_path / "perplexity.jsonl"
    assert commands_in(file) == [command.split() for command in RUNS["perplexity"]]


def test_rows_of_a_command_of_once_are_left_out(started, tmp_path):
    main, calls, _ = started
    file = tmp_path / "ruler.jsonl"
    add(file, "paged-kv eval ruler --examples 1")
    assert main(["--data", ".", "ruler"]) == 0
    assert len(calls) == 1
    assert commands_in(file) == [RUNS["ruler"][0].split()]


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_of_the_commands(name):
    """What is published was made by these commands, all of them, and no other."""
    rows = results.read([SCRIPT.parent / "results" / f"{name}.jsonl"])
    wanted = {shlex.join(["paged-kv", *command.split()]) for command in RUNS[name]}
    assert {row["command"] for row in rows} == wanted


def test_answers_that_quote_longbench_are_not_passed_on(started, tmp_path):
    """Its texts are others', and a model repeats them."""
    main, _, _ = started
    main(["--data", "."])
    for name in ("ruler", "longbench"):
        file = tmp_path / f"{name}.jsonl"
        (row,) = results.read([file])
        file.write_text("")
        example = {"id": "a", "score": 0.5, "answer": "a whole sentence"}
        results.append(file, {**row, "examples": [example]})
        with file.open("a") as lines:  # one of a command that is no longer ours: written anew
            lines.write(file.read_text().replace("paged-kv eval", "paged-kv once"))
        NAMES["_only_of"](name, file)
        (row,) = results.read([file])
        answers = [] if name == "longbench" else ["a whole sentence"]
        assert [each["answer"] for each in row["examples"] if "answer" in each] == answers
        assert (row["examples"][0]["id"], row["examples"][0]["score"]) == ("a", 0.5)


def test_no_answer_to_longbench_is_published():
    rows = results.read([SCRIPT.parent / "results" / "longbench.jsonl"])
    examples = [each for row in rows for each in row.get("examples", [])]
    assert examples
    assert {*map(frozenset, examples)} == {frozenset({"id", "score"})}


def test_an_unknown_name(started, capsys):
    main, calls, _ = started
    with pytest.raises(SystemExit, match="2"):
        main(["--data", ".", "nope"])
    assert "NAME must be one of perplexity, peers, " in capsys.readouterr().err
    assert not calls
