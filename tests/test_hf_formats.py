"""Quantized pages in transformers: what attention reads is what the codec makes of each entry.

Small steps of Sequences, with keys and values given, can be compared exactly. Whole models only
roughly: noise of 1e-7 before a layer can move a number to the next level, and that is a wrong
number by a level from then on; so errors are compared with what the format itself costs.
"""

from __future__ import annotations

import copy
import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import load, prompt

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, enable, generate_batch
from paged_kv.hf.arena import Geometry, PackedArena
from paged_kv.hf.sequences import Sequences
from paged_kv.kernels.operands import Terms
from paged_kv.kernels.page_layout import Codec
from paged_kv.quant import QUANTIZED, make_layout

FORMATS = list(QUANTIZED)
SMALL = {"budget": 48, "num_sink_tokens": 2, "recent_window": 16}
SNAPKV = {"policy": "snapkv", "budget": 80, "observation_window": 16}
POLICIES: list[dict[str, Any]] = [
    {},
    {"policy": "streaming", **SMALL},
    {"policy": "snapkv", "observation_window": 8, **SMALL},
    {"policy": "h2o", **SMALL},
    {"policy": "lru", **SMALL},
]
LAYERS, KV_HEADS, HEADS, SIZE, PAGE = 2, 2, 4, 32, 16
CPU = torch.device("cpu")
GEOMETRY = Geometry(KV_HEADS, SIZE, SIZE, torch.float32, torch.float32, CPU)
Rows = list[torch.Tensor]


def stored(codec: Codec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers))


def sequences(rows: int, page_format: str, pool: PagePool | None = None, **options) -> Sequences:
    config = CompressionConfig.from_dict({"page_format": page_format, **options})
    found = Sequences(config, range(LAYERS), LAYERS, pool or PagePool(None, PAGE), pool is None)
    found.add_rows(rows, [70] * rows)
    return found


class Inputs:
    """Random queries, keys and values of each step."""

    def __init__(self, page_format: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.codec = make_layout(page_format, torch.float32, SIZE, SIZE, PAGE).key

    def step(self, counts: list[int]) -> tuple[Rows, Rows, Rows]:
        def random(heads: int) -> Rows:
            return [torch.randn(heads, n, SIZE, generator=self.generator) for n in counts]

        keys = random(KV_HEADS)
        for row in keys:
            row[..., :2] *= 8  # as RoPE has it
        return random(HEADS), keys, random(KV_HEADS)


def run(held: Sequences, layer: int, queries: Rows, keys: Rows, values: Rows, terms: Terms) -> Rows:
    if len({query.shape[1] for query in queries}) == 1:
        stacked = (torch.stack(part) for part in (queries, keys, values))
        return list(held.attend(layer, *stacked, terms))
    return held.attend_ragged(layer, queries, keys, values, terms)


STEPS: list[Any] = [
    [33, 70, 0], [37, 0, 70], [1, 1, 1], [1, 0, 1], [2, 1, 1], ("select", [2, 0, 0, 1]),
    *[[1, 1, 1, 1]] * 30, ("crop", 3), [1, 1, 1, 1], ("select", [3, 1]), *[[1, 1]] * 20,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("options", POLICIES, ids=lambda one: one.get("policy", "full"))
@pytest.mark.parametrize("page_format", FORMATS)
def test_pages_equal_native_ones_of_what_the_codec_makes(page_format, options):
    """Ragged prompts, decoding, forks that share pages, crop; softcap and sinks, too."""
    inputs = Inputs(page_format)
    packed, native = (sequences(3, name, **options) for name in (page_format, "native"))
    plain, other = Terms(0.3), Terms(0.3, 5.0, torch.arange(4.0))
    for step in STEPS:
        if isinstance(step, tuple):
            for held in (packed, native):
                held.select_rows(step[1]) if step[0] == "select" else held.crop(step[1])
            continue
        for held in (packed, native):
            held.begin(np.array(step), GEOMETRY)
        for layer, terms in enumerate((plain, other)):
            queries, keys, values = inputs.step(step)
            found = run(packed, layer, queries, keys, values, terms)
            keys, values = ([stored(inputs.codec, row) for row in part] for part in (keys, values))
            expected = run(native, layer, queries, keys, values, terms)
            for own, one in zip(found, expected, strict=True):
                torch.testing.assert_close(own, one, atol=3e-5, rtol=1e-5)
        for held in (packed, native):
            held.end()
        assert np.array_equal(packed.size, native.size)
    ours, theirs = packed.stats(), native.stats()
    assert ours.evicted == theirs.evicted
    assert (ours.evicted > 0) == bool(options)
    entry = make_layout(page_format, torch.float32, SIZE, SIZE, PAGE).entry_bytes
    assert ours.bytes == ours.pages * KV_HEADS * PAGE * entry
    assert ours.bytes * 2 * SIZE * 4 == theirs.bytes * entry


class Plain:
    """One row of one layer under `streaming`, in lists: (position, key, value, as stored)."""

    def __init__(self, codec: Codec, residual: int, budget: int | None) -> None:
        self.codec, self.residual, self.budget = codec, residual, budget
        self.entries: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.num_tokens = self.known_from = 0  # whether the ring has it: crop may have lost some

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        count = query.shape[1]
        self.entries += [
            (self.num_tokens + i, key[:, i], value[:, i]) for i in range(count)
        ]  # fmt: skip
        self.num_tokens += count
        first = (-(-self.num_tokens // PAGE) - self.residual) * PAGE
        self.known_from = first = max(first, self.known_from)
        position = torch.tensor([entry[0] for entry in self.entries])
        keys, values = (torch.stack([entry[i] for entry in self.entries], 1) for i in (1, 2))
        is_native = (position >= first)[:, None]
        keys = torch.where(is_native, keys, stored(self.codec, keys))
        values = torch.where(is_native, values, stored(self.codec, values))
        logits = query.unflatten(0, (KV_HEADS, -1)) @ keys[:, None].transpose(-1, -2) * 0.3
        own = torch.arange(self.num_tokens - count, self.num_tokens)[:, None]
        chances = logits.masked_fill(position > own, -torch.inf).softmax(-1)
        return (chances @ values[:, None]).flatten(0, 1)

    def drop(self) -> None:
        if self.budget is None or self.num_tokens < 70:
            return
        kept = self.num_tokens - max(0, (self.num_tokens - self.budget) // PAGE * PAGE)
        while len(self.entries) > kept:
            del self.entries[SMALL["num_sink_tokens"]]

    def crop(self, count: int) -> None:
        self.num_tokens -= count
        del self.entries[-count:]
        if self.num_tokens < self.known_from:
            self.known_from = -(-self.num_tokens // PAGE) * PAGE


@torch.no_grad()
@pytest.mark.parametrize(("policy", "residual"), [("full", 1), ("streaming", 2)])
def test_the_newest_pages_are_read_as_they_were(policy, residual):
    options = {**SMALL, "recent_window": 32} if policy == "streaming" else {}
    budget = 64 if policy == "streaming" else None
    options |= {"policy": policy, "residual_pages": residual} | ({"budget": 64} if budget else {})
    inputs, held = Inputs("int4"), sequences(3, "int4", **options)
    plain = [[Plain(inputs.codec, residual, budget) for _ in range(3)] for _ in range(LAYERS)]
    back = 30 if policy == "full" else 1  # else a compaction would lie between
    for step in [*STEPS, ("crop", 8), [1, 1], ("crop", back), *[[1, 1]] * 20, [40, 3], [1, 1]]:
        if isinstance(step, tuple) and step[0] == "select":
            held.select_rows(step[1])
            plain = [[copy.deepcopy(rows[i]) for i in step[1]] for rows in plain]
            continue
        if isinstance(step, tuple):
            held.crop(step[1])
            for rows in plain:
                for one in rows:
                    one.crop(step[1])
            continue
        held.begin(np.array(step), GEOMETRY)
        for layer, rows in enumerate(plain):
            given = inputs.step(step)
            found = run(held, layer, *given, Terms(0.3))
            for own, one, new in zip(found, rows, zip(*given, strict=True), strict=True):
                if new[0].shape[1]:
                    torch.testing.assert_close(own, one.attend(*new), atol=3e-5, rtol=1e-5)
        held.end()
        for rows in plain:
            for one in rows:
                one.drop()
        assert held.size.tolist() == [[len(one.entries) for one in rows] for rows in plain]
    ring = LAYERS * 2 * residual * KV_HEADS * PAGE * 2 * SIZE * 4
    assert held.stats().bytes - ring == held.stats().pages * PAGE * KV_HEADS * (16 + 4) * 2


@pytest.mark.parametrize("page_format", FORMATS)
def test_pages_that_move_keep_their_bytes(page_format):
    arena = PackedArena(GEOMETRY._replace(page_format=page_format), PAGE, 4)
    numbers = torch.randn(2, KV_HEADS, 2 * PAGE, SIZE, generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
    arena.write(*numbers, places)
    before = arena.content["blocks"].clone()
    arena.copy(np.array([1]), np.array([2]))
    assert torch.equal(arena.content["blocks"][:, 2], before[:, 1])
    arena.resize(9, np.array([2, 3]), np.array([7, 0]))
    assert torch.equal(arena.content["blocks"][:, 7], before[:, 1])
    assert torch.equal(arena.content["blocks"][:, 0], before[:, 3])
    zero, head, slots = torch.tensor(0), torch.arange(KV_HEADS)[:, None], torch.arange(16)
    source, target = ((zero, torch.tensor(page), head, slots) for page in (7, 5))
    for entries in arena.pages:
        entries.move(source, target)
    assert torch.equal(arena.content["blocks"][:, 5], before[:, 1])
    kept = arena.pages.keys.gather(zero[None], torch.tensor([[0]]))[0, 0]
    arena.pages.keys.store(source, numbers[0][:, :16] + 1)
    codec = arena.layout.key
    found = arena.pages.keys.gather(zero[None], torch.tensor([[7, 0]]))[0, 0]
    assert torch.equal(found, torch.cat([stored(codec, numbers[0][:, :16] + 1), kept], 1))


# ---- models


def coded_cache(model: Any, page_format: str) -> Any:
    """transformers' cache, whose full layers hold what the codec makes of keys and values."""
    from transformers import DynamicCache

    class Coded(DynamicCache):
        def update(self, key: Any, value: Any, layer: int, *args: Any, **more: Any) -> Any:
            if not self.layers[layer].is_sliding:
                codec = QUANTIZED[page_format](key.shape[-1])
                key, value = stored(codec, key), stored(codec, value)
            return super().update(key, value, layer, *args, **more)

    return Coded(config=model.config)


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
