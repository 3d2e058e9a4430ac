"""Quantized pages in transformers: what attention reads is what the codec makes of each entry.

Small steps of Sequences, with keys and values given: they can be compared exactly.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from coded_cache import stored

from paged_kv.config import CompressionConfig
from paged_kv.hf import PagePool
from paged_kv.hf.arena import Geometry, PackedArena
from paged_kv.hf.paged_attention import Terms
from paged_kv.hf.sequences import Sequences
from paged_kv.kernels.page_layout import Codec
from paged_kv.policies.h2o import H2O
from paged_kv.quant import QUANTIZED, make_layout

FORMATS = list(QUANTIZED)
SMALL = {"budget": 48, "num_sink_tokens": 2, "recent_window": 16}

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


@pytest.mark.parametrize("page_format", FORMATS)
def test_scores_that_fade(page_format, monkeypatch):
    """As the kernels have them, and as they are computed beside native pages."""
    monkeypatch.setattr(H2O, "score_decay", 0.9)
    options = {"policy": "h2o", **SMALL}
    test_pages_equal_native_ones_of_what_the_codec_makes(page_format, options)


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
