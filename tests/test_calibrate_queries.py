"""`paged-kv calibrate queries`: what it writes, who finds it, and what is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import engines
import hf_models
import numpy as np
import pytest
import query_files
import tiny_models
import torch
from query_loops import assert_same, of_model
from reference_loop import load_model
from safetensors import safe_open
from safetensors.numpy import load_file

from paged_kv import cli
from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache
from paged_kv.hf.driver.loading import encode
from paged_kv.model_identity import identity
from paged_kv.policies.query_statistics import GATHERED

TOKENS, CONTEXT, WORDS = 200, 50, 400
SHAPE = (6, 2, 2, 32)
POLICY = {"policy": "calibrated_attention", "budget": 96}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of its own, in which nothing has been looked for."""
    monkeypatch.setenv("PAGED_KV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", WORDS)


def calibrate(model: str, text: Path, *args: Any) -> int:
    given = ["--model", model, "--text", text, "--tokens", TOKENS, "--context", CONTEXT, *args]
    return cli.main(["calibrate", "queries", *map(str, given)])


def printed(capsys: Any) -> Path:
    return Path(capsys.readouterr().out.strip())


@pytest.mark.parametrize("seed", [0, 5])
def test_the_file(tiny, text, tmp_path, capsys, seed):
    """Of the parts of the text that the seed draws; in float16."""
    output = tmp_path / "queries.safetensors"
    assert calibrate(tiny, text, "--output", output, "--seed", seed) == 0
    assert printed(capsys) == output
    tokens = encode(Path(tiny), text.read_text())
    starts = sorted(random.Random(seed).sample(range(len(tokens) // CONTEXT), TOKENS // CONTEXT))
    parts = [tokens[start * CONTEXT :][:CONTEXT] for start in starts]
    expected = of_model(load_model(tiny), parts, TOKENS)
    with safe_open(output, "np") as file:
        found = {name: file.get_tensor(name) for name in expected}
        about = file.metadata()
    assert {part.dtype for part in found.values()} == {np.dtype("float16")}
    assert found["linear"].shape == SHAPE
    assert_same(found, expected, 2e-3)
    assert about == {
        "format": query_files.FORMAT,
        "model": Path(tiny).name,
        "text": "text.txt",
        "tokens": str(TOKENS),
    }


def test_seeds_are_different_parts(tiny, text, tmp_path):
    found = []
    for seed in (0, 0, 1):
        output = tmp_path / f"{len(found)}.safetensors"
        assert calibrate(tiny, text, "--output", output, "--seed", seed) == 0
        found.append(query_files.read(str(output)))
    for name, part in found[0].items():
        assert np.array_equal(part, found[1][name])
        assert not np.array_equal(part, found[2][name])


def test_layers_without_full_attention_have_none(text, tmp_path):
    """Nobody asks for them: zeros, at their index in the model."""
    model = tiny_models.saved("gemma3", tmp_path, tokenizer=True)
    output = tmp_path / "queries.safetensors"
    assert calibrate(model, text, "--output", output) == 0
    linear = query_files.read(str(output))["linear"]
    assert [bool(layer.any()) for layer in linear] == [False, True] * 3


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gpt_neox", (4, 4, 1, 16)), ("gemma2", (4, 2, 2, 16)), ("qwen3", (4, 2, 2, 16))],
)
def test_other_models(name, shape, text, tmp_path, capsys):
    """Partial RoPE and every head a KV head; softcaps: found by their caches."""
    model = copy.deepcopy(hf_models.load(name))
    if name == "gpt_neox":
        del model.config.num_key_value_heads  # which a real one does not have
    model.save_pretrained(tmp_path / name)
    tiny_models.save_tokenizer(tmp_path / name)
    assert calibrate(str(tmp_path / name), text) == 0
    place = printed(capsys)
    assert query_files.read(str(place))["linear"].shape == shape
    with PagedCache(load_model(tmp_path / name).config, **POLICY) as cache:
        assert cache.compression.options["statistics"] == str(place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3-all-sliding", "no layer with full attention"),
        ("bloom", "AttentionInterface"),
        ("gemma3n", "share their KV cache"),
    ],
)
def test_models_without_statistics(name, message, text, tmp_path, capsys):
    model = tiny_models.saved(name, tmp_path, tokenizer=True)
    assert calibrate(model, text) == 2
    assert message in capsys.readouterr().err


@torch.inference_mode()
def test_everybody_finds_it(tiny, text, cache, capsys):
    """In the cache, by the model's identity: transformers and the reference engine; no option."""
    model = load_model(tiny)
    before = PagedCache(model.config, **POLICY)
    assert before.compression.options["statistics"] == GATHERED
    assert calibrate(tiny, text) == 0
    place = printed(capsys)
    assert place == cache / "query_statistics" / f"{identity(Path(tiny))}.safetensors"
    found = PagedCache(model.config, **POLICY)
    assert found.compression.options["statistics"] == str(place)
    assert ReferenceEngine(model, CompressionConfig.from_dict(POLICY)).gathering is None
    named = PagedCache(model.config, statistics=str(place), **POLICY)
    wrapped = PagedCache(model.config, policy="residual", of="calibrated_attention", budget=96)
    assert wrapped.compression.options["statistics"] == str(place)
    ids = torch.tensor([list(range(3, 203))])
    for each in (found, named):
        model(ids[:, :150], past_key_values=each)
    outputs = [[model(ids[:, at : at + 1], past_key_values=each).logits
                for at in range(150, 200)] for each in (found, named)]  # fmt: skip
    assert torch.equal(*map(torch.cat, outputs))
    gathered = PagedCache(model.config, statistics=GATHERED, **POLICY)  # as the user says
    assert gathered.compression.options["statistics"] == GATHERED


@pytest.mark.vllm
def test_vllm_finds_it(tiny, text, capsys):
    settings = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20}
    assert calibrate(tiny, text) == 0
    place = printed(capsys)
    with engines.engine(tiny, POLICY, **settings) as llm:
        own = llm.llm_engine.vllm_config.additional_config["paged_kv"]
        assert own["statistics"] == str(place)
        assert own["fading"] == "on"  # pages of ours
        compactor = engines.worker(llm).compactor
        assert compactor.observer.gathering is None
        assert engines.generate(llm, [list(range(3, 203))], 40)
        assert compactor.num_events > 0


def test_what_is_there_stays(tiny, text, cache, capsys, monkeypatch):
    """Unless --force; nor is the model loaded for it."""
    assert calibrate(tiny, text) == 0
    place = printed(capsys)
    content = load_file(place)["linear"]
    with monkeypatch.context() as patched:
        patched.setattr("paged_kv.eval.calibrate_queries.collect", None)
        assert calibrate(tiny, text, "--seed", 1) == 0
        assert printed(capsys) == place
    assert np.array_equal(load_file(place)["linear"], content)
    assert calibrate(tiny, text, "--seed", 1, "--force") == 0
    assert not np.array_equal(load_file(place)["linear"], content)
    assert sorted(path.name for path in place.parent.iterdir()) == [place.name]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "/nowhere"], "text /nowhere: no such file"),
        (["--output", "/nowhere/x.safetensors"], "must be a .safetensors file in a directory that"),
        (["--output", "x.json"], "output x.json must be a .safetensors file"),
        (["--context", "201"], "context 201 must be at most tokens, 200"),
        (["--tokens", "5000"], f"has {WORDS} tokens; tokens 5000 in contexts of 50 need 5000"),
        (["--model", "/nowhere"], "model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(tiny, text, cache, capsys, monkeypatch, args, message):
    monkeypatch.setattr("paged_kv.hf.driver.loading.load_model", None)  # none gets that far
    assert calibrate(tiny, text, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paged-kv: error: ")
    assert message in line
    assert not cache.exists()
