"""`paged-kv generate`: its mistakes, and that it writes what transformers and vLLM write."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import engines  # noqa: F401  sets the environment of vLLM
import pytest
import tiny_models
import torch

from paged_kv import cli
from paged_kv.config import CompressionConfig
from paged_kv.hf.driver.conversation import Conversation, load_tokenizer
from paged_kv.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ 't30' if m.role == 'user' else 't31' }} {{ m.content }} t33 "
    "{% endfor %}{% if add_generation_prompt %}t31 {% endif %}"
)
PROMPT = " ".join(f"t{30 + 7 * index % 60}" for index in range(150))
NEW = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tiny_models.saved("llama", tmp_path_factory.mktemp("models"), tokenizer=True)
    (Path(directory) / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def generate(tiny, capsys, monkeypatch):
    """Runs the command: (exit code, text, statistics and notes)."""

    def run(*args, stdin="", model=tiny):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(["generate", "--model", str(model), *map(str, args)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def statistic(notes: str, name: str) -> int:
    found = re.findall(rf"\b{name} (\d+)", notes)
    assert found, notes
    return int(found[-1])


def continued(tiny, tokens: list[int], **options) -> tuple[list[int], str]:
    """What transformers writes with its own cache: tokens and text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = output[0, len(tokens) :].tolist()
    return new, load_tokenizer(Path(tiny)).decode(new, skip_special_tokens=True)


def reference(tiny, **options) -> str:
    """What follows PROMPT."""
    return continued(tiny, load_tokenizer(Path(tiny))(PROMPT).input_ids, **options)[1]


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


# ---- text


def test_text_is_that_of_transformers(generate, tiny):
    code, text, notes = generate("--prompt", PROMPT, "--max-new-tokens", NEW)
    assert code == 0
    assert text.strip() == reference(tiny)
    assert f"{150} tokens read, {NEW} written" in notes
    assert statistic(notes, "tokens") == 150 + NEW - 1  # the last one is not read
    assert statistic(notes, "evicted") == 0


def test_a_prompt_file_is_read(generate, tiny, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    _, text, _ = generate("--prompt-file", file, "--max-new-tokens", NEW)
    assert text.strip() == reference(tiny)


def test_beams_are_those_of_transformers(generate, tiny):
    _, text, _ = generate("--prompt", PROMPT, "--max-new-tokens", NEW, "--num-beams", 3)
    assert text.strip() == reference(tiny, num_beams=3)


def test_sampling_repeats_with_its_seed(generate, tiny):
    options = ["--prompt", PROMPT, "--max-new-tokens", NEW, "--temperature", 0.8, "--top-k", 20]
    texts = [generate(*options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].strip() != reference(tiny)
    torch.manual_seed(1)
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 1.0}
    assert texts[0].strip() == reference(tiny, **sampled)


def test_a_budget_holds(generate, tiny):
    options = ["--policy", "streaming", "--budget", 80, "--page-size", 16]
    code, text, notes = generate("--prompt", PROMPT, "--max-new-tokens", NEW, *options)
    assert code == 0
    assert text.strip() != reference(tiny)
    layers, tokens = 6, 150 + NEW - 1
    assert 80 * layers <= statistic(notes, "entries") < (80 + 16) * layers
    assert statistic(notes, "evicted") == tokens * layers - statistic(notes, "entries")
    assert "cache (streaming, budget 80)" in notes


def test_the_environment_says_what_is_kept(generate, monkeypatch):
    options = ["--prompt", PROMPT, "--max-new-tokens", NEW]
    given = generate(*options, "--policy", "snapkv", "--budget", 100)[1]
    monkeypatch.setenv("PAGED_KV_POLICY", "snapkv")
    monkeypatch.setenv("PAGED_KV_BUDGET", "100")
    _, text, notes = generate(*options)
    assert text == given
    assert "cache (snapkv, budget 100)" in notes


# ---- conversations


def test_a_conversation_grows_at_the_end(tiny):
    conversation = Conversation(load_tokenizer(Path(tiny)))
    first = conversation.ask("t40 t41")
    assert first == [30, 40, 41, 33, 31]
    conversation.answered([50, 51])
    assert conversation.ask("t42") == [*first, 50, 51, 33, 30, 42, 33, 31]


def test_a_conversation_that_the_template_shows_otherwise_is_encoded_anew(tiny):
    conversation = Conversation(load_tokenizer(Path(tiny)))
    conversation.ask("t40")
    conversation.answered([50, 2, 51])  # t2 is special: the template does not show it
    assert conversation.ask("t42") == [30, 40, 33, 31, 50, 51, 33, 30, 42, 33, 31]


def test_chat_answers_every_line(generate, tiny):
    lines = f"{PROMPT}\n\nt44 t45\n/exit\nt46\n"
    options = ["--chat", "--max-new-tokens", NEW]
    code, text, notes = generate(*options, stdin=lines)
    assert code == 0
    answers = text.strip("\n").split("\n")
    assert len(answers) == 2
    first = [30, *load_tokenizer(Path(tiny))(PROMPT).input_ids, 33, 31]
    tokens, answer = continued(tiny, first)
    assert answers[0].strip() == answer
    assert answers[1].strip() == continued(tiny, [*first, *tokens, 33, 30, 44, 45, 33, 31])[1]
    assert notes.count("tokens read") == 2


def test_chat_ends_when_the_conversation_is_too_long(generate):
    lines = "\n".join([PROMPT] * 20)
    code, text, notes = generate("--chat", "--max-new-tokens", 8, stdin=lines)
    assert code == 0
    assert "tokens, of 2040 at most: it ends here" in notes
    assert 10 <= len(text.strip().split("\n")) < 20


@pytest.mark.parametrize("beams", [1, 2])
def test_the_cache_is_used_again_between_turns(tiny, capsys, beams):
    from paged_kv.hf.driver.text import TextGenerator

    tokenizer = load_tokenizer(Path(tiny))
    conversation = Conversation(tokenizer)
    sampling = Sampling(max_new_tokens=8, num_beams=beams)
    config = CompressionConfig.from_dict({"policy": "streaming", "budget": 80})
    engine = TextGenerator(Path(tiny), tokenizer, config, sampling, 32)
    lengths: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[-1]),
        with_kwargs=True,
    )
    conversation.answered(engine.write(conversation.ask(PROMPT)))
    assert lengths == [150 + 3, *[1] * 7]
    lengths.clear()
    engine.write(conversation.ask("t40"))
    # The last token of the answer, the end of its turn, the question's four tokens.
    again = 1 + 1 + 4 if beams == 1 else 150 + 3 + 8 + 5
    assert lengths[0] == again
    engine.close()
    capsys.readouterr()


def test_quantized_pages(generate):
    args = ["--page-format", "int8", "--residual-pages", "1", "--max-new-tokens", "8"]
    code, text, notes = generate("--prompt", PROMPT, *args)
    assert code == 0
    assert text.strip()
    assert "page_format int8" in notes
    held = 6 * 160 * 2 * 2 * (32 + 2) + 6 * 32 * 2 * 2 * 32 * 4  # pages, and the residual
    assert f"device_bytes {held}" in notes
    code, _, notes = generate("--prompt", PROMPT, "--page-format", "int8", "--page-size", "8")
    assert code == 2
    assert "page_size 8: packed pages need a multiple of 16" in notes


# ---- as a user runs it


def run(*args, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paged_kv.cli", "generate", *map(str, args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300, **options
    )


@pytest.mark.vllm
def test_vllm_writes_and_counts(tiny):
    more = json.dumps({"num_sink_tokens": 2})
    policy = ["--policy", "streaming", "--budget", 80, "--policy-config", more]
    result = run(
        *("--model", tiny, "--prompt", PROMPT, "--max-new-tokens", NEW, "--engine", "vllm"), *policy
    )
    assert result.returncode == 0, result.stderr
    assert 0 < len(result.stdout.split()) <= NEW
    assert "cache (streaming, budget 80)" in result.stderr
    # The prompt's pages, of 32 tokens; then at most the budget and one page more.
    assert statistic(result.stderr, "peak_pages") == 5
    assert statistic(result.stderr, "pages") <= 4


@pytest.mark.model
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_chat_with_a_real_model(smollm2_dir, engine):
    lines = "What is the capital of France?\nAnd of Italy? Answer briefly.\n"
    result = run(
        *("--model", smollm2_dir, "--chat", "--engine", engine, "--max-new-tokens", 32),
        # Attention by our kernels: on some CPUs with AMX vLLM 0.32's own babbles in bfloat16.
        *("--policy", "streaming", "--budget", "512"),
        input=lines,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "Rome" in result.stdout
