"""`paged-kv generate`: mistakes are one line, and are found before a model is loaded."""

import json
import re
from pathlib import Path

import engines  # noqa: F401  sets the environment of vLLM
import pytest
import tiny_models
from generate_command import PROMPT, Command, model_for_chats

from paged_kv.sampling import Sampling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model_for_chats(tmp_path_factory.mktemp("models"))


@pytest.fixture
def generate(tiny, capsys, monkeypatch):
    return Command(tiny, capsys, monkeypatch)


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "nope"], "unknown kv-policy 'nope'; known are: full"),
        (["--policy", "streaming", "--budget", "0"], "budget must be an integer >= 1"),
        (["--policy", "streaming", "--budget", "40"], "budget 40 is too small: it must be at"),
        (["--policy-config", "{"], "policy-config is not JSON"),
        (["--policy-config", '{"budget": 3}'], "policy-config must not have budget: use --budget"),
        (["--policy", "h2o", "--policy-config", '{"x": 3}'], "unknown paged_kv option x"),
        (
            ["--policy", "h2o", "--policy-config", '{"spill": true, "spill_dir": "/nowhere"}'],
            "spill_dir must be a directory to write to, not '/nowhere': No such file",
        ),
        (["--page-size", "0"], "page-size must be an integer >= 1, not 0"),
        (["--page-format", "int3"], "page_format must be one of native, int8, .*, not 'int3'"),
        (["--max-new-tokens", "0"], "max-new-tokens must be an integer >= 1, not 0"),
        (["--temperature", "-1"], "temperature must be a number >= 0, not -1.0"),
        (["--temperature", "nan"], "temperature must be a number >= 0, not nan"),
        (["--top-k", "0"], "top-k must be an integer >= 1, not 0"),
        (["--top-p", "1.5"], "top-p must be a number above 0, at most 1, not 1.5"),
        (["--temperature", "0", "--top-k", "5"], "top-k has no effect with temperature 0"),
        (["--num-beams", "0"], "num-beams must be an integer >= 1, not 0"),
        (["--num-beams", "3", "--engine", "vllm"], "num-beams 3: engine vllm has no beams"),
        (["--seed", "-1"], "seed must be an integer >= 0, not -1"),
        (["--max-new-tokens", "2000"], "the prompt has 150 tokens: .* at most the model's 2048"),
    ],
)
def test_mistakes_are_one_line(generate, args, message):
    code, text, notes = generate("--prompt", PROMPT, *args)
    assert (code, text) == (2, "")
    assert re.fullmatch(f"paged-kv: error: .*{message}.*\n", notes), notes


def test_mistakes_are_found_before_a_model_is_loaded(generate, tmp_path):
    broken = tiny_models.config_only("llama", tmp_path)  # has no weights that could be loaded
    code, _, notes = generate("--prompt", "t30", "--policy", "nope", model=broken)
    assert code == 2
    assert "unknown kv-policy" in notes


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("llama", ["--policy-config", '{"skip_layers": [6]}'], "skip_layers"),
        ("gemma3-all-sliding", [], "no layer of this model has full attention"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_its_weights_are_read(
    generate, tmp_path, model, args, message
):
    directory = tiny_models.config_only(model, tmp_path)
    tiny_models.save_tokenizer(Path(directory))
    args = ["--prompt", "t30", "--policy", "streaming", *args]
    code, _, notes = generate(*args, model=directory)
    assert code == 2
    assert re.fullmatch(f"paged-kv: error: .*{message}.*\n", notes), notes


def test_a_model_that_does_not_write_text(generate, tmp_path):
    directory = tiny_models.saved("llama", tmp_path, tokenizer=True)
    file = Path(directory) / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "vit", "architectures": None}
    file.write_text(json.dumps(config))
    code, _, notes = generate("--prompt", "t30", model=directory)
    assert code == 2
    assert re.fullmatch("paged-kv: error: .*\n", notes), notes


def test_a_wrong_variable_is_named(generate, monkeypatch):
    monkeypatch.setenv("PAGED_KV_BUDGET", "lots")
    code, _, notes = generate("--prompt", PROMPT, "--policy", "streaming")
    assert code == 2
    assert "PAGED_KV_BUDGET must be" in notes


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"], ids=["missing", "not UTF-8"])
def test_a_prompt_file_that_cannot_be_read(generate, tmp_path, content):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    code, _, notes = generate("--prompt-file", file)
    assert code == 2
    assert f"prompt-file {file}: " in notes


def test_an_empty_prompt(generate):
    code, _, notes = generate("--prompt", "")
    assert code == 2
    assert "the prompt has 0 tokens: it must have at least 1" in notes


def test_a_source_is_needed(generate):
    with pytest.raises(SystemExit) as error:
        generate()
    assert error.value.code == 2


def test_chat_needs_a_template(generate, tmp_path):
    model = tiny_models.saved("llama", tmp_path, tokenizer=True)
    code, _, notes = generate("--chat", model=model)
    assert code == 2
    assert "has no chat template: use prompt instead of chat" in notes


def test_temperature_follows_from_what_else_is_given():
    assert Sampling().effective_temperature == 0
    assert Sampling(top_k=5).effective_temperature == 1
    assert Sampling(top_p=0.5).effective_temperature == 1
    assert Sampling(temperature=0.7, top_k=5).effective_temperature == 0.7
