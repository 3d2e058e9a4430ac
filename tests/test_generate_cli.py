"""`paged-kv generate` writes what transformers and vLLM write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import engines  # noqa: F401  sets the environment of vLLM
import pytest
import torch
from generate_command import NEW, PROMPT, Command, continued, model_for_chats, reference, statistic

from paged_kv.config import CompressionConfig
from paged_kv.hf.driver.conversation import Conversation, load_tokenizer
from paged_kv.sampling import Sampling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model_for_chats(tmp_path_factory.mktemp("models"))


@pytest.fixture
def generate(tiny, capsys, monkeypatch):
    return Command(tiny, capsys, monkeypatch)


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


@pytest.mark.vllm
def test_vllm_writes_and_counts(generate):
    more = json.dumps({"num_sink_tokens": 2})
    policy = ["--policy", "streaming", "--budget", 80, "--policy-config", more]
    code, text, notes = generate(
        "--prompt", PROMPT, "--max-new-tokens", NEW, "--engine", "vllm", *policy
    )
    assert code == 0, notes
    assert 0 < len(text.split()) <= NEW
    assert "cache (streaming, budget 80)" in notes
    # The prompt's pages, of 32 tokens; then at most the budget and one page more.
    assert statistic(notes, "peak_pages") == 5
    assert statistic(notes, "pages") <= 4


# ---- as a user runs it


def run(*args, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paged_kv.cli", "generate", *map(str, args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300, **options
    )


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
