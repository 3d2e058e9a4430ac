"""CUDA graphs over the attention: what a captured graph reads, step after step, on CPU tensors.

vLLM's own builders run here; kernels, real graphs and streams do not.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import graph_steps
import numpy as np
import policy_cases
import pytest
from gpu_steps import (
    LAYERS,
    PAGE_SIZE,
    SINKS,
    attention_layer,
    caches,
    scheduler_output,
    v1_runner,
)
from graph_steps import BACKENDS, MAX_LEN, WIDTH, Runner, evicted, random_step

from paged_kv.policies.streaming import Streaming
from paged_kv.vllm.worker import step as worker_step
from paged_kv.vllm.worker.attention import wrap_backend
from paged_kv.vllm.worker.packed import packed_backend
from paged_kv.vllm.worker.step import Compactor

RECENT = 8
KINDS = ["V1", "V2"]


def rows_read(metadata: Any, rows: int) -> list[tuple[int, list[int]]]:
    """(length, page ids that hold it) of each row: what an attention kernel looks at."""
    found = []
    for row in range(rows):
        length = int(metadata.seq_lens[row])
        pages = -(-length // PAGE_SIZE)
        found.append((length, metadata.block_table[row, :pages].tolist()))
    return found


def rows_wanted(step: Any, prompts: list[int], before: list[int]) -> list[tuple[int, list[int]]]:
    """The same, from vLLM's own table and the schedule's rule; nothing of padded rows."""
    wanted: list[tuple[int, list[int]]] = []
    for row in range(step.num_reqs):
        length = int(step.seq_lens[row])
        gone = evicted(before[row], prompts[row]) if row < len(prompts) else 0
        pages = step.block_table_tensor[row, gone // PAGE_SIZE : -(-length // PAGE_SIZE)]
        wanted.append((length - gone, pages.tolist()))
    return wanted


@contextmanager
def step_of(compactor: Compactor, names: int, monkeypatch: Any) -> Any:
    """A real step; nothing lies in its pages, so nothing is moved."""
    monkeypatch.setattr(compactor, "_compact", lambda pending: None)
    with compactor.step(scheduler_output({f"r{row}": 0 for row in range(names)})):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", BACKENDS)
def test_captured_graphs_read_what_each_step_retains(module, kind, monkeypatch):
    """Two graphs, of 8 and of 4 rows; steps with other events, padded, use one or the other."""
    runner = Runner(kind)
    builder, compactor = graph_steps.builder(module, runner, Streaming(SINKS, RECENT))
    graphs = {rows: builder.build_for_cudagraph_capture(runner.dummy(rows)) for rows in (8, 4)}
    random, events = np.random.default_rng(1), 0
    for turn in range(12):
        padded = (8, 4)[turn % 2]
        prompts, before, new = random_step(random, padded)
        if turn == 5:  # nobody has dropped anything: the graph still reads our tables
            prompts = before = [40] * len(new)
        step = runner.batch(prompts, before, new, padded)
        with step_of(compactor, len(new), monkeypatch):
            built = builder.build(0, step)
        captured = graphs[padded]
        for name in ("block_table", "seq_lens", "query_start_loc"):
            assert getattr(built, name).data_ptr() == getattr(captured, name).data_ptr()
        assert rows_read(captured, padded) == rows_wanted(step, prompts, before)
        assert captured.seq_lens[len(new) : padded].tolist() == [0] * (padded - len(new))
        assert built.max_seq_len == max(length for length, _ in rows_read(captured, padded))
        assert captured.block_table.shape == (padded, WIDTH)
        events += compactor.num_events
    assert events > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", ["flash_attn", "triton_attn", "rocm_attn"])
def test_a_capture_is_for_the_longest_sequence(module, kind):
    """Kernels are chosen, and memory is taken, for what may come: as vLLM passes it."""
    runner = Runner(kind)
    builder, _ = graph_steps.builder(module, runner, Streaming(SINKS, RECENT))
    captured = builder.build_for_cudagraph_capture(runner.dummy(4))
    assert captured.max_seq_len == MAX_LEN
    # Rows of one token in the null page, and never vLLM's own memory.
    assert rows_read(captured, 4) == [(1, [0])] * 4
    assert captured.block_table.data_ptr() != runner.dummy(4).block_table_tensor.data_ptr()


def test_a_dummy_step_between_real_ones_reads_null_pages(monkeypatch):
    """Where data parallel ranks have nothing to run, vLLM replays the graph over dummy rows."""
    runner = Runner("V2")
    builder, compactor = graph_steps.builder("triton_attn", runner, Streaming(SINKS, RECENT))
    captured = builder.build_for_cudagraph_capture(runner.dummy(4))
    step = runner.batch([100, 60], [100, 99], [1, 1], padded=4)
    with step_of(compactor, 2, monkeypatch):
        builder.build(0, step)
    assert rows_read(captured, 2) == rows_wanted(step, [100, 60], [100, 99])[:2]
    builder.build_for_cudagraph_capture(runner.dummy(4))
    assert rows_read(captured, 4) == [(1, [0])] * 4


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE"])
def test_without_full_graphs_nothing_is_copied_before_something_is_dropped(mode, monkeypatch):
    runner = Runner("V1")
    builder, compactor = graph_steps.builder("triton_attn", runner, Streaming(SINKS, RECENT), mode)
    for before, shifted in (([60, 50], False), ([70, 50], True)):
        step = runner.batch([60, 50], before, [1, 1])
        with step_of(compactor, 2, monkeypatch):
            built = builder.build(0, step)
        assert (built.block_table.data_ptr() != step.block_table_tensor.data_ptr()) is shifted
        assert (built.seq_lens.data_ptr() != step.seq_lens.data_ptr()) is shifted
        assert rows_read(built, 2) == rows_wanted(step, [60, 50], before)


WINDOW, KNOWN = policy_cases.WINDOW, policy_cases.CALIBRATED
NEEDS_NO_QUERIES = [
    *((name, {}) for name in ("streaming", "window", "random", "knorm", "keydiff", "learned")),
    ("pooling", {}),
    ("pooling", {"mode": "best", "best_by": "coordinates"}),
    ("value_merge", {"of": "knorm"}),
    ("calibrated_attention", {"fading": "off", **KNOWN}),
]
NEEDS_QUERIES = [
    *((name, WINDOW) for name in ("snapkv", "attention", "hybrid", "past_future")),
    *((name, {}) for name in ("h2o", "lru", "tova")),
    ("pooling", {"mode": "best"}),
    ("calibrated_attention", {"fading": "on", **KNOWN}),
    ("calibrated_attention", {"fading": "off"}),  # gathers statistics
]


@pytest.mark.parametrize(
    ("name", "options", "piecewise"),
    [*((*case, False) for case in NEEDS_NO_QUERIES), *((*case, True) for case in NEEDS_QUERIES)],
)
def test_who_may_be_in_a_graph(name, options, piecewise, monkeypatch):
    """As vLLM's backend says, unless the forward pass shows queries, or pages are packed."""
    from vllm.v1.attention.backend import AttentionCGSupport

    monkeypatch.setattr(worker_step, "find_rotary", lambda model, names: None)
    layers = {name: attention_layer(view) for name, view in zip(LAYERS, caches(), strict=True)}
    runner = v1_runner()
    runner.get_model = lambda: None
    compactor = Compactor(runner, policy_cases.make(name, options), layers)
    for module in BACKENDS:
        stock = graph_steps.backend(module)
        own = stock.get_builder_cls().get_cudagraph_support(None, None)
        assert own is not AttentionCGSupport.NEVER
        builder = wrap_backend(stock, compactor).get_builder_cls()
        support = builder.get_cudagraph_support(None, None)
        assert support is (AttentionCGSupport.NEVER if piecewise else own)
        packed = packed_backend(stock, compactor, None).get_builder_cls()
        assert packed.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
