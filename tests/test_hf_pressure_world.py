"""Random caches in one pool: steps, copies, rows that move, crops, releases.

Keys and values are given, so that no model is needed. After each event the pool's pages add up;
PoolFull is raised only if nobody could shrink. At the end each row is computed again, alone, in a
pool without a limit and told when it shrank: its last outputs are those.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import NEVER
from paged_kv.hf import PagePool, PoolFull
from paged_kv.hf.arena import Geometry
from paged_kv.hf.copies import copy_rows
from paged_kv.hf.sequences import Sequences
from paged_kv.kernels.operands import Terms

LAYERS, HEADS, SIZE, PAGE = 3, 2, 16, 16
GEOMETRY = Geometry(HEADS, SIZE, SIZE, torch.float32, torch.float32, torch.device("cpu"))
SMALL = {"budget": 40, "num_sink_tokens": 2, "recent_window": 8}
POLICIES: list[dict[str, Any]] = [
    {"policy": "streaming", **SMALL},
    {"policy": "snapkv", "observation_window": 3, **SMALL},
    {"policy": "h2o", **SMALL},
    {"policy": "pyramidal+snapkv", **SMALL, "budget": 56, "observation_window": 3},
    {"policy": "streaming", "page_format": "int8", **SMALL},
]
Tensor = torch.Tensor


@dataclass
class Row:
    """What a row was given: for each step [3, layers, heads, tokens, size], and its last output."""

    steps: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)  # by layer

    def copy(self) -> Row:
        return Row(list(self.steps), list(self.output))


@dataclass
class Cache:
    options: dict[str, Any]
    held: Sequences
    rows: list[Row]


def make(options: dict[str, Any], pool: PagePool) -> Sequences:
    config = CompressionConfig.from_dict({**options, "start": "pressure"})
    held = Sequences(config, range(LAYERS), LAYERS, pool, is_private=False)
    pool.join(held)
    return held


def run(held: Sequences, inputs: Tensor) -> list[Tensor]:
    """A step of inputs [rows, 3, layers, heads, tokens, size]: outputs of each layer."""
    count = inputs.shape[4]
    held.begin(np.full(len(inputs), count, dtype=np.int64), GEOMETRY)
    outputs = [
        held.attend(layer, *inputs[:, :, layer].unbind(1), Terms(SIZE**-0.5))
        for layer in range(LAYERS)
    ]
    held.end()
    return outputs


class World:
    """Caches in one pool.

    Args:
        seed: of all that happens.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.pool = Random(seed), PagePool(150, PAGE)
        self.generator = torch.Generator().manual_seed(seed)
        self.caches: list[Cache] = []
        self.num_full = self.num_shrunk = self.num_checked = 0

    def event(self) -> None:
        """Something happens."""
        kinds = [self.step] * 60 + [self.turn] * 2 + [self.copy, self.move, self.release, self.crop]
        if len(self.caches) < 2 or (len(self.caches) < 5 and self.random.random() < 0.03):
            return self.begin()
        self.random.choice(kinds)(self.random.choice(self.caches))
        self.pool.check_integrity()

    def begin(self) -> None:
        options, count = self.random.choice(POLICIES), self.random.randint(1, 3)
        held = make(options, self.pool)
        held.add_rows(count)
        self.caches.append(Cache(options, held, [Row() for _ in range(count)]))
        self.turn(self.caches[-1])

    def step(self, cache: Cache, count: int = 1) -> None:
        shape = len(cache.rows), 3, LAYERS, HEADS, count, SIZE
        inputs = torch.randn(shape, generator=self.generator)
        try:
            outputs = run(cache.held, inputs)
        except PoolFull:
            self.num_full += 1
            for other in self.caches:
                assert not other.held.shrinkable().any()
            return self.finish(cache)
        for at, row in enumerate(cache.rows):
            row.steps.append(inputs[at])
            row.output = [part[at] for part in outputs]

    def turn(self, cache: Cache) -> None:
        self.step(cache, self.random.randint(2, 90))

    def copy(self, cache: Cache) -> None:
        held = make(cache.options, self.pool)
        copy_rows(cache.held, held)
        self.caches.append(Cache(cache.options, held, [row.copy() for row in cache.rows]))

    def move(self, cache: Cache) -> None:
        indices = [self.random.randrange(len(cache.rows)) for _ in range(self.random.randint(1, 3))]
        cache.held.select_rows(indices)
        cache.rows = [cache.rows[index].copy() for index in indices]

    def crop(self, cache: Cache) -> None:
        """Of the last step, if it is allowed."""
        count = cache.rows[0].steps[-1].shape[3]
        if cache.rows[0].output and len(cache.rows[0].steps) > 1:
            try:
                cache.held.crop(count)
            except ValueError:
                return
            for row in cache.rows:
                row.steps.pop()
                row.output = []

    def release(self, cache: Cache) -> None:
        if self.random.random() < 0.3:
            self.finish(cache)

    def finish(self, cache: Cache) -> None:
        """A cache is checked, and goes."""
        self.caches.remove(cache)
        starts = cache.held.pressed.tolist()
        self.num_shrunk += sum(start < NEVER for start in starts)
        for row, start in zip(cache.rows, starts, strict=True):
            if row.output:
                self.check(cache.options, row, start)
        cache.held.release()
        self.pool.check_integrity()

    def check(self, options: dict[str, Any], row: Row, start: int) -> None:
        alone = make(options, PagePool(None, PAGE))
        alone.add_rows(1)
        for inputs in row.steps:
            if start == alone.num_tokens[0]:  # before a prompt of another turn, too
                alone.prompt_lens[:] = 0
                alone.shrink(np.array([0]))
            outputs = run(alone, inputs[None])
        for found, expected in zip(row.output, outputs, strict=True):
            torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)
        self.num_checked += 1


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_random_worlds(seed):
    world = World(seed)
    for _ in range(700):
        world.event()
    for cache in copy.copy(world.caches):
        world.finish(cache)
    assert world.pool.num_held == 0
    assert world.num_full
    assert world.num_shrunk > 5
    assert world.num_checked > 5
