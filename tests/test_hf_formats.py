"""Quantized pages in whole models of transformers.

They can be compared only roughly: noise of 1e-7 before a layer can move a number to the next level,
and that is a wrong number by a level from then on; so errors are compared with what the format
itself costs. test_hf_packed_pages.py compares steps exactly.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import torch
from coded_cache import coded_cache
from hf_models import load, prompt

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, enable, generate_batch
from paged_kv.quant import QUANTIZED, make_layout

FORMATS = list(QUANTIZED)

SNAPKV = {"policy": "snapkv", "budget": 80, "observation_window": 16}


# ---- models


@torch.no_grad()
def logits(model: Any, cache: Any, ids: torch.Tensor, chunks: list[int], **more) -> torch.Tensor:
    """[rows, tokens, vocabulary] of tokens that are given."""
    found, start = [], 0
    for count in chunks:
        part = ids[:, start : start + count]
        mask = more.get("attention_mask")
        own = {}
        if mask is not None:
            places = mask.cumsum(1)[:, start : start + count] - 1
            own = {"attention_mask": mask[:, : start + count], "position_ids": places.clamp_min(0)}
        found.append(model(part, past_key_values=cache, **own).logits)
        start += count
    return torch.cat(found, 1)


def check_close(found: torch.Tensor, expected: torch.Tensor, native: torch.Tensor) -> None:
    """The error is a small part of what the format costs, and for most tokens noise."""
    error, cost = (found - expected).abs(), (native - expected).abs()
    assert error.mean() < 0.1 * cost.mean(), (error.mean(), cost.mean())
    assert error.max() < 0.7 * cost.max(), (error.max(), cost.max())


@pytest.mark.parametrize(
    ("name", "page_format"), [("llama", "fp8"), ("gemma2", "int8"), ("gpt_oss", "int4")]
)
def test_models(name, page_format):
    model, ids = load(name), torch.tensor([prompt(60)])
    chunks = [20, 25, *[1] * 15]
    expected = logits(model, coded_cache(model, page_format), ids, chunks)
    with PagedCache(model.config, page_size=16) as cache:
        native = logits(model, cache, ids, chunks)
    with PagedCache(model.config, page_size=16, page_format=page_format) as cache:
        check_close(logits(model, cache, ids, chunks), expected, native)
        assert cache.stats().page_format == page_format


COMMON = {("snapkv", "int4", 1), ("pooling", "int8", 0), ("pooling", "int4", 0), ("h2o", "fp8", 1)}
CASES = list(product(["streaming", "snapkv", "h2o", "pooling", "value_merge"], FORMATS, [0, 1]))


@pytest.mark.parametrize(
    ("policy", "page_format", "residual"),
    [pytest.param(*one, marks=() if one in COMMON else pytest.mark.exhaustive) for one in CASES],
)
def test_policies_give_what_the_reference_engine_gives(policy, page_format, residual):
    """Merging ones, too: what has changed is quantized again, and nothing else."""
    model, tokens = load("llama"), torch.randperm(160, generator=torch.Generator().manual_seed(0))
    ids, chunks = tokens[None] + 3, [100, *[1] * 60]
    found = {}
    for name in (page_format, "native"):
        options = {"policy": policy, "budget": 80, "page_format": name}
        options["residual_pages"] = residual if name != "native" else 0
        config = CompressionConfig.from_dict(options)
        engine = ReferenceEngine(model, config, 16, 100)
        parts = [engine.logits(engine.process(part)) for part in ids[0].split(chunks)]
        found[name] = torch.cat(parts)[None]
        if name == page_format:
            with PagedCache(model.config, config, page_size=16) as cache:
                ours = logits(model, cache, ids, chunks)
                assert cache.sequences.size[:, 0].tolist() == engine.num_kept
    check_close(ours, found[page_format], found["native"])


def test_a_padded_row_is_its_solo_run():
    model, lengths = load("llama"), [90, 41]
    rows = torch.stack([torch.tensor(prompt(120, seed)) for seed in (0, 1)])
    mask = torch.ones_like(rows)
    mask[1, : 90 - 41] = 0
    chunks, options = [90, *[1] * 30], {**SNAPKV, "page_size": 16, "residual_pages": 1}
    with PagedCache(model.config, page_format="int8", **options) as cache:
        together = logits(model, cache, rows, chunks, attention_mask=mask)
    for row, length in enumerate(lengths):
        ids = rows[row : row + 1, 90 - length :]
        with PagedCache(model.config, page_format="int8", **options) as cache:
            alone = logits(model, cache, ids, [length, *[1] * 30])
        with PagedCache(model.config, page_size=16, **SNAPKV) as cache:
            native = logits(model, cache, ids, [length, *[1] * 30])
        check_close(together[row : row + 1, 90 - length :], alone, native)


def generate(model: Any, tokens: list[int], cache: Any, count: int = 16, **more) -> list[int]:
    more |= {"do_sample": False, "max_new_tokens": count}
    ids = torch.tensor([tokens])
    more["attention_mask"] = torch.ones_like(ids)  # or a pad token among them would be hidden
    return model.generate(ids, past_key_values=cache, **more)[0, len(tokens) :].tolist()


@pytest.mark.parametrize("options", [{}, {**SNAPKV, "residual_pages": 2}], ids=["full", "snapkv"])
def test_generate(options):
    """Chunks, beams, turns, reset and crop: all that generate() can do with a cache."""
    model, tokens = load("llama"), prompt(100)
    with PagedCache(model.config, page_size=16, page_format="int8", **options) as cache:
        expected = generate(model, tokens, cache)
        cache.reset()
        assert cache.stats().bytes == 0
        beams = generate(model, tokens, cache, num_beams=3)
        cache.reset()
        assert generate(model, tokens, cache, num_beams=3) == beams
        cache.reset()
        assert generate(model, tokens, cache, prefill_chunk_size=32)[0] == expected[0]
        cache.reset()
        assert generate(model, tokens, cache, 8) == expected[:8]  # and goes on in a second turn
        assert generate(model, tokens + expected[:8], cache, 8) == expected[8:]
        if options:  # a compaction lies between
            with pytest.raises(ValueError, match=r"use copy\.deepcopy"):
                cache.crop(-5)
            return
        cache.crop(-5)
        assert generate(model, tokens + expected[:11], cache, 5) == expected[11:]


def test_a_pool_of_two_formats(tmp_path):
    """Layers of several formats share one limit; what is freed can have the other format."""
    model, file = load("llama"), tmp_path / "formats.json"
    file.write_text(json.dumps({"layers": ["int8", "native", "int4", "int4"]}))
    pool = PagePool(64, page_size=16)
    with PagedCache(model.config, pool=pool, page_format=str(file), **SNAPKV) as cache:
        one = generate(model, prompt(100), cache)
        stats = cache.stats()
        assert stats.pages == 4 * -(-(100 + 15 - 32) // 16)
        per_layer = stats.pages // 4 * 2 * 16
        assert stats.bytes == per_layer * ((16 + 2) * 2 + 16 * 2 * 4 + 2 * (8 + 4) * 2)
        pool.check_integrity()
        with pytest.raises(ValueError, match="num_pages 64 is too small"):
            generate(model, prompt(400), PagedCache(model.config, pool=pool, page_format="int8"))
    assert pool.num_held == 0
    batch = generate_batch(
        model, [prompt(100), prompt(30)], page_format=str(file), page_size=16, num_pages=64,
        max_new_tokens=16, progress_bar=False, **SNAPKV,
    )  # fmt: skip
    assert batch[0] == one
    file.write_text(json.dumps({"layers": ["int8"] * 3}))
    with pytest.raises(ValueError, match="the file has 3 layers, the model 4"):
        PagedCache(model.config, page_format=str(file))


@pytest.mark.parametrize("page_format", FORMATS)
def test_memory_shrinks(page_format):
    model, held = load("llama"), {}
    for name in ("native", page_format):
        with PagedCache(model.config, page_size=16, page_format=name) as cache:
            generate(model, prompt(400), cache, 4)
            held[name] = cache.stats().bytes, cache.stats().peak_bytes, cache.pool.capacity_bytes
    entry = make_layout(page_format, torch.float32, 16, 16, 16).entry_bytes
    for own, native in zip(held[page_format], held["native"], strict=True):
        assert own * 128 == native * entry


def test_encoder_decoders_masks_and_enable(monkeypatch):
    """T5's position bias is none of the kernels' terms; the option may come from anywhere."""
    model, ids = load("t5"), torch.tensor([prompt(30)])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    with PagedEncoderDecoderCache(model, page_format="int8", page_size=16) as cache:
        found = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.stats().page_format == "int8"
    assert torch.equal(found[:, :8], expected[:, :8])
    monkeypatch.setenv("PAGED_KV_POLICY_CONFIG", '{"page_format": "int4", "residual_pages": 1}')
    model = load("llama")
    with enable(model, page_size=16) as enabled:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert enabled.stats().page_format == "int4"


def test_a_mask_of_ones_own():
    """Entries are decoded where a mask has to be applied; the answer is that of the kernels."""
    model, ids = load("llama"), torch.tensor([prompt(60)])
    causal = torch.ones(60, 60).tril().bool()[None, None]
    for residual in (0, 1):
        options = {"page_size": 16, "page_format": "int4", "residual_pages": residual}
        with PagedCache(model.config, **options) as cache:
            expected = logits(model, cache, ids, [50, *[1] * 10])
        with PagedCache(model.config, **options) as cache, torch.no_grad():
            first = model(ids[:, :50], past_key_values=cache, attention_mask=causal[..., :50, :50])
            found = [first.logits]
            for step in range(50, 60):
                mask = causal[..., step : step + 1, : step + 1]
                more = model(ids[:, step : step + 1], past_key_values=cache, attention_mask=mask)
                found.append(more.logits)
        with PagedCache(model.config, page_size=16) as cache:
            native = logits(model, cache, ids, [50, *[1] * 10])
        check_close(torch.cat(found, 1), expected, native)


def test_training_is_refused():
    model, ids = load("llama"), torch.tensor([prompt(20)])
    with PagedCache(model.config, page_size=16, page_format="int8") as cache:
        found = model(ids, past_key_values=cache).logits
        with pytest.raises(ValueError, match="quantized pages have no gradients"):
            found.sum().backward()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"page_format": "int3"}, "page_format must be one of native, int8, int4, fp8 or"),
        ("llama", {"page_format": "x.json"}, "page_format x.json: the file cannot be read"),
        ("llama", {"page_format": "int8", "page_size": 8}, "page_size 8: packed pages need a mult"),
        ("llama", {"page_format": "int8", "attention": "flex"}, "attention 'flex' reads pages of"),
        ("llama", {"residual_pages": 1}, "residual_pages 1: with page_format native all pages"),
        ("llama", {"page_format": "int8", "residual_pages": -1}, "residual_pages must be an int"),
        (
            "llama",
            {"page_format": "int4", "residual_pages": 10**6},
            "residual_pages must be at most 32, the pages of 32 that a sequence of 1024 tokens has",
        ),
        (
            "llama",
            {"page_format": "int8", "residual_pages": 3, "page_size": 16, **SNAPKV},
            "residual_pages 3 of 16 needs a recent_window of at least 48, not 32",
        ),
        (
            "llama",
            {"policy": CompressionConfig(), "page_format": "int8"},
            "policy is a CompressionConfig: page_format must be in it",
        ),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(load(name).config, **options)


def test_head_sizes_that_packed_pages_cannot_have():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=96, num_attention_heads=4, head_dim=24, num_hidden_layers=2)
    with pytest.raises(ValueError, match="head_dim 24: packed pages need a multiple of 16"):
        PagedCache(config, page_format="int8")
    PagedCache(config).close()
