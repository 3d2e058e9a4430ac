"""`paged-kv eval perplexity`: mistakes are one line, and are found before a model is loaded."""

import engines  # noqa: F401  sets the environment of vLLM
import pytest
import tiny_models

from paged_kv import cli

SHORT = ["--prompt-tokens", "160", "--score-tokens", "100"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "nope"], "unknown kv-policy 'nope'; known are: full"),
        (["--policy", "streaming,nope"], "unknown kv-policy 'nope'"),
        (["--policy", "streaming", "--budget", "0"], "budget must be an integer >= 1"),
        (["--policy", "streaming", "--budget", "128,x"], "not 'x'"),
        (
            ["--policy", "full,streaming", "--budget", "128,256,128"],
            "budget 128,256,128, page-format native: streaming 128 native is there 2 times",
        ),
        (
            ["--policy", "full", "--page-format", "native,int8,native"],
            "page-format native,int8,native: full native is there 2 times",
        ),
        (
            ["--policy", "streaming", "--budget", "64"],
            "budget 64 is too small: it must be at least 68",
        ),
        (["--policy", "streaming", "--page-size", "128", "--budget", "128"], "one page of 128"),
        (["--policy", "streaming", "--policy-config", "{"], "policy-config is not JSON"),
        (["--policy", "streaming", "--policy-config", '{"x": 1}'], "unknown paged_kv option x"),
        (["--policy", "streaming", "--policy-config", '{"budget": 1}'], "use --budget"),
        (
            ["--policy", "snapkv", "--policy-config", '{"kernel_size": 0}'],
            "kernel_size must be an integer >= 1, not 0",
        ),
        (["--policy", "full", "--offset", "-1"], "offset must be an integer >= 0, not -1"),
        (
            ["--policy", "full", "--offset", "200", *SHORT],
            "has 400 tokens; offset 200, prompt-tokens 160 and score-tokens 100 need 461",
        ),
        (
            ["--policy", "full", "--offset", "20", *SHORT, "--windows", "2"],
            "has 400 tokens; offset 20, windows 2, stride 261, prompt-tokens 160 and "
            "score-tokens 100 need 542",
        ),
        (
            ["--policy", "full", *SHORT, "--windows", "5", "--stride", "50"],
            "offset 0, windows 5, stride 50, prompt-tokens 160 and score-tokens 100 need 461",
        ),
        (
            [
                "--policy",
                "full",
                "--engine",
                "vllm",
                "--prompt-tokens",
                "10",
                "--score-tokens",
                "10",
            ],
            "score-tokens 10 with prompt-tokens 10",
        ),
        (["--policy", "full", "--page-format", "int8,int3"], "page_format must be one of"),
        (["--policy", "full", "--page-format", "x.json"], "page_format x.json: the file cannot"),
        (["--policy", "full", "--residual-pages", "1"], "residual_pages 1: with page_format nat"),
        (
            ["--policy", "full", "--page-format", "int8", "--page-size", "8"],
            "page_size 8: packed pages need a multiple of 16",
        ),
        (
            ["--policy", "full", "--policy-config", '{"page_format": "int8"}'],
            "policy-config must not have page_format: use --page-format",
        ),
        (
            [
                "--policy",
                "full",
                "--page-format",
                "int8",
                "--residual-pages",
                "1",
                "--engine",
                "vllm",
                *SHORT,
            ],
            "residual-pages 1: engine vllm scores in one chunk",
        ),
        (
            [
                *("--policy", "streaming", "--engine", "vllm"),
                *("--policy-config", '{"skip_layers": [0], "max_groups": 5}', *SHORT),
            ],
            "these options need 6 KV cache groups, more than max_groups 5",
        ),
        (
            [
                *("--policy", "streaming", *SHORT),
                *("--policy-config", '{"spill": true, "spill_dir": "/nowhere"}'),
            ],
            "spill_dir must be a directory to write to, not '/nowhere': No such file",
        ),
        (["--policy", "full", "--text", "/nowhere"], "text /nowhere: no such file"),
        (["--policy", "full,dynamic", "--protocol", "stream"], "peers compress prompts only"),
        (["--policy", "kvpress:nope"], "unknown kv-policy 'kvpress:nope'"),
        (
            ["--policy", "kvpress:snapkv", "--kvpress-python", "/nowhere"],
            "kvpress-python /nowhere",
        ),
        (["--policy", "full", "--model", "/nowhere"], "model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(tiny, text, capsys, monkeypatch, args, message):
    monkeypatch.setattr("paged_kv.eval.reference_runs.load_model", None)  # none gets that far
    command = ["eval", "perplexity", "--model", tiny, "--text", str(text)]
    assert cli.main([*command, *args]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("paged-kv: error: ")
    assert message in line


@pytest.mark.parametrize(("option", "value"), [("--windows", "0"), ("--stride", "-5")])
def test_no_windows_and_no_stride(tiny, text, capsys, option, value):
    command = ["eval", "perplexity", "--model", tiny, "--text", str(text), "--policy", "full"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, f"{option}={value}"])
    assert f"{option}: must be an integer >= 1, not '{value}'" in capsys.readouterr().err


def test_no_evaluation_and_no_protocol(capsys):
    for args in (["eval"], ["eval", "nope"], ["eval", "perplexity", "--protocol", "nope"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(args)
        assert "usage: paged-kv eval" in capsys.readouterr().err
