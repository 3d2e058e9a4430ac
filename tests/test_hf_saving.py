"""A cache in a file: after load, token for token what the never-saved cache gives."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import load, padded, prompt
from hf_questions import OPTIONS as ALL_OPTIONS
from hf_questions import QUESTIONS as ALL_QUESTIONS
from hf_questions import ask, read
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, PoolFull, state_file

EARLY: dict[str, Any] = {"budget": 96, "compress_prefill": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming": {"policy": "streaming", **EARLY},
    "snapkv": {"policy": "snapkv", **EARLY},
    "late": {"policy": "snapkv", "budget": 96},
    "pyramid": {"policy": "pyramidal", **EARLY},
    "fraction": {"policy": "tova", "budget": 0.3, "min_budget": 80, "compress_prefill": True},
    "h2o": {"policy": "h2o", **EARLY},
    "ratings": ALL_OPTIONS["ratings"],
    "gathered": ALL_OPTIONS["gathered"],
    "gathering": {**ALL_OPTIONS["gathered"], "budget": 224},  # not yet when it is saved
    "rated": {**ALL_OPTIONS["ratings"], "spill": True, "spill_interval": 0, "fading": "off"},
    "random": {"policy": "random", "seed": 2**70 + 5, **EARLY},
    "learned": {"policy": "learned", **EARLY},
    "residual": {"policy": "residual", "of": "attention", **EARLY},
    "merging": {"policy": "value_merge", **EARLY},
    "pooling": {"policy": "pooling", "page_format": "fp8", **EARLY},
    "spill": {"policy": "snapkv", "spill": True, "spill_interval": 0, **EARLY},
    "spill8": {"policy": "h2o", "spill": True, "page_format": "int8", **EARLY},
    "int8": {"policy": "lru", "page_format": "int8", **EARLY},
    "int4": {"policy": "snapkv", "page_format": "int4", "residual_pages": 1, **EARLY},
    "int4 full": {"page_format": "int4", "residual_pages": 2, "recent_window": 64},
}
QUESTIONS = ALL_QUESTIONS[:2]


def held(cache: PagedCache) -> Any:
    """Its statistics without what crop would need: that is not saved."""
    return replace(cache.stats(), side_bytes=0)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A cache of "llama" that has read the context, under snapkv."""
    model = load("llama")
    with PagedCache(model.config, **OPTIONS["snapkv"]) as cache:
        read(model, cache)
        cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize("name", OPTIONS)
def test_answers_are_those_of_the_saved_cache(name, tmp_path):
    """Before a question, and in the middle of an answer; into private pages and a shared pool."""
    model, options, path = load("llama"), OPTIONS[name], tmp_path / "cache"
    with PagedCache(model.config, **options) as cache:
        read(model, cache)
        cache.save(path)
        before = held(cache)
        expected = [ask(model, copy.deepcopy(cache), question) for question in QUESTIONS]
    pool = PagePool()
    for question, answer in zip(QUESTIONS, expected, strict=True):
        with PagedCache.load(path, model.config, pool=pool) as cache:
            assert held(cache) == before
            assert ask(model, cache, question) == answer
        with PagedCache.load(path, model.config) as cache:
            first = ask(model, cache, question, 20)
            cache.save(path.with_name("later"))
            read_on = question + first
        with PagedCache.load(path.with_name("later"), model.config) as cache:
            assert cache.pool.num_held == cache.stats().pages
            assert first + ask(model, cache, read_on, 25) == answer
    assert pool.num_held == 0


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "gpt2", "qwen3_next", "jamba"])
def test_models(name, tmp_path):
    """Softcaps, sinks, sliding windows, linear attention; no RoPE."""
    model, path = load(name), tmp_path / "cache"
    with PagedCache(model.config, **OPTIONS["late"]) as cache:
        read(model, cache)
        ask(model, cache, [5], 3)
        cache.save(path)
        context = [5] + [7] * 40
        expected = ask(model, cache, context)
    with PagedCache.load(path, model.config) as cache:
        assert ask(model, cache, context) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["snapkv", "spill", "int4"])
def test_dtypes(name, dtype, tmp_path):
    model, path = load("llama", dtype=dtype), tmp_path / "cache"
    with PagedCache(model.config, **OPTIONS[name]) as cache:
        read(model, cache)
        cache.save(path)
        expected = ask(model, cache, QUESTIONS[0])
    with PagedCache.load(path, model.config) as cache:
        assert ask(model, cache, QUESTIONS[0]) == expected
    cache = PagedCache.load(path, load("llama").config)
    with cache, pytest.raises(ValueError, match=f"this cache holds .*{dtype}.*torch.float32"):
        ask(load("llama"), cache, QUESTIONS[0])


def test_what_transformers_leaves_in_a_config(saved, monkeypatch):
    """A call with is_causal is told to the model through its config."""
    model = load("llama")
    with PagedCache.load(saved, model.config) as cache:
        expected = ask(model, cache, QUESTIONS[0])
    monkeypatch.setattr(model.config, "is_causal", True, raising=False)
    with PagedCache.load(saved, model.config) as cache:
        assert ask(model, cache, QUESTIONS[0]) == expected


@pytest.mark.parametrize("name", ["late", "h2o", "spill", "int4"])
def test_padded_rows_that_share_pages(name, tmp_path):
    """Each page is in the file once, and shared again."""
    model, options, path = load("llama"), OPTIONS[name], tmp_path / "cache"
    inputs = padded([prompt(160), prompt(90, seed=1)])
    follow = torch.tensor([prompt(40, seed) for seed in range(3)])
    mask = torch.nn.functional.pad(inputs["attention_mask"][[1, 0, 0]], (0, 40), value=1)

    def run(cache: PagedCache) -> torch.Tensor:
        found = []
        for step in range(40):
            new, own = follow[:, step : step + 1], mask[:, : 161 + step]
            found.append(model(new, attention_mask=own, past_key_values=cache).logits)
        return torch.stack(found)

    with torch.no_grad(), PagedCache(model.config, **options) as cache:
        model(**inputs, past_key_values=cache)
        held = cache.stats().pages
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        cache.save(path)
        expected = run(cache)
    with torch.no_grad(), PagedCache.load(path, model.config) as cache:
        assert cache.stats().pages == cache.pool.num_held == held
        torch.testing.assert_close(run(cache), expected, atol=1e-4, rtol=1e-4)
        cache.pool.check_integrity()


def test_another_process(saved, tmp_path):
    """Nothing but the file is needed."""
    model = load("llama")
    with PagedCache.load(saved, model.config) as cache:
        expected = ask(model, cache, QUESTIONS[0])
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent / "support")!r})
from hf_models import load
from hf_questions import QUESTIONS, ask
from paged_kv.hf import PagedCache
model = load("llama")
with PagedCache.load({str(saved)!r}, model.config) as cache:
    print(ask(model, cache, QUESTIONS[0]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_spilled_entries_may_lie_elsewhere(tmp_path):
    model, path = load("llama"), tmp_path / "cache"
    with PagedCache(model.config, **OPTIONS["spill"]) as cache:
        read(model, cache)
        cache.save(path)
        expected = ask(model, cache, QUESTIONS[0])
    places: dict[str, Any] = {"spill_dir": str(tmp_path), "spill_host_budget": 32}
    with PagedCache.load(path, model.config, **places) as cache:
        assert cache.stats().bytes_by_tier["mmap"] > 0
        assert ask(model, cache, QUESTIONS[0]) == expected


def test_a_file_is_replaced_at_once(saved):
    """Whoever has opened it before reads what was there; a failure leaves it as it was."""
    model, before = load("llama"), saved.read_bytes()
    with PagedCache(model.config) as cache, safe_open(saved, "pt") as opened:
        read(model, cache)
        assert opened.get_tensor("num_tokens").tolist() == [203]
        cache.save(saved)
        assert saved.read_bytes() != before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    with PagedCache.load(saved, model.config) as cache:
        assert not cache.compression.enabled


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2", r"is of another model.*model_type: 'llama', 'qwen2'"),
        ("llama-draft", r"num_hidden_layers: 4, 1"),
        ("llama-every-head", r"num_key_value_heads: 2, 4"),
    ],
)
def test_another_model(saved, name, message):
    with pytest.raises(ValueError, match=message):
        PagedCache.load(saved, load(name).config)


def test_another_rope_or_dtype(saved):
    config = copy.deepcopy(load("llama").config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(ValueError, match=r"rope_parameters: .*10000\.0.*500000\.0"):
        PagedCache.load(saved, config)
    config = copy.deepcopy(load("llama").config)
    config.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="keys of dtype float32, but the model's dtype is bfloat"):
        PagedCache.load(saved, config)
    other = load("qwen2")
    cache = PagedCache.load(saved, load("llama").config)
    with cache, PagedCache(other.config), pytest.raises(ValueError, match="of another model"):
        ask(other, cache, [5])


def test_wrong_options(saved, tmp_path):
    config = load("llama").config
    with pytest.raises(ValueError, match="has pages of 32 entries, not 16"):
        PagedCache.load(saved, config, page_size=16)
    with pytest.raises(ValueError, match="page_size 32 differs from the pool's, 16"):
        PagedCache.load(saved, config, pool=PagePool(page_size=16))
    with pytest.raises(ValueError, match="budget, policy: a saved cache keeps its policy"):
        PagedCache.load(saved, config, policy="h2o", budget=7)
    with pytest.raises(ValueError, match="device 'cuda:7' cannot be used here"):
        PagedCache.load(saved, config, device="cuda:7")
    with pytest.raises(ValueError, match="attention must be one of"):
        PagedCache.load(saved, config, attention="eager")
    pool = PagePool(num_pages=10)
    with pytest.raises(PoolFull, match="a saved cache needs"):
        PagedCache.load(saved, config, pool=pool)
    assert pool.num_held == 0
    assert config._attn_implementation == "sdpa"


def test_damaged_files(saved, tmp_path):
    config, whole = load("llama").config, saved.read_bytes()
    with pytest.raises(ValueError, match="cannot be read"):
        PagedCache.load(tmp_path / "missing", config)
    damaged = tmp_path / "damaged"
    for cut in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged"):
            PagedCache.load(damaged, config)
    for place in range(40, len(whole), len(whole) // 37):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged|no file that PagedCache"):
            PagedCache.load(damaged, config)
    save_file({"a": torch.zeros(3)}, damaged)
    with pytest.raises(ValueError, match=r"no file that PagedCache\.save wrote"):
        PagedCache.load(damaged, config)
    with safe_open(saved, "pt") as opened:
        metadata = dict(opened.metadata())
    metadata["paged_kv"] = metadata["paged_kv"].replace("snapkv", "knorm")
    save_file(load_file(saved), damaged, metadata)
    with pytest.raises(ValueError, match="its checksum is wrong"):
        PagedCache.load(damaged, config)


def test_what_cannot_be_saved(tmp_path):
    model = load("llama")
    with PagedCache(model.config) as cache:
        with pytest.raises(ValueError, match="holds nothing yet"):
            cache.save(tmp_path / "cache")
        read(model, cache)
        for path in (tmp_path, tmp_path / "missing" / "cache"):
            with pytest.raises(ValueError, match="path must be a file in an existing directory"):
                cache.save(path)
    with pytest.raises(ValueError, match="has been closed"):
        cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot be saved"):
        PagedEncoderDecoderCache(load("t5")).save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error:.*tiers:DeprecationWarning")
def test_a_file_that_has_an_option_s_old_name(saved):
    """Nobody is told: whoever has the file did not write the option."""
    tensors, about = state_file.read(saved)
    about["options"]["tiers"] = about["options"].pop("pyramid_steps") + 1
    state_file.write(saved, tensors, about)
    with PagedCache.load(saved, load("llama").config) as cache:
        assert cache.compression.pyramid_steps == 4
