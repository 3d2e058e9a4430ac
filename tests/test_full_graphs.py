"""CUDA graphs over the attention: what a captured graph reads, step after step, on CPU tensors.

vLLM's own builders run here; kernels, real graphs and streams do not.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import engines
import graph_steps
import numpy as np
import policy_cases
import pytest
import torch
from gpu_steps import (
    BEFORE,
    LAYERS,
    PAGE_SIZE,
    RUNNERS,
    SINKS,
    SPEC,
    attention_layer,
    caches,
    metadata,
    scheduler_output,
    v1_runner,
)
from graph_steps import BACKENDS, MAX_LEN, MAX_ROWS, WIDTH, Runner

from paged_kv.policies.streaming import Streaming
from paged_kv.vllm.worker import layer_group
from paged_kv.vllm.worker import step as worker_step
from paged_kv.vllm.worker.attention import wrap_backend
from paged_kv.vllm.worker.packed import packed_backend
from paged_kv.vllm.worker.step import Compactor

RECENT = 8
KINDS = ["V1", "V2"]


def evicted(num_tokens: int, prompt: int) -> int:
    """From the rule in words: whole pages above the budget of 48, from the prompt's end on."""
    pages = (num_tokens - 48) // PAGE_SIZE
    return max(0, pages) * PAGE_SIZE if num_tokens >= prompt else 0


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


def random_step(random: Any, most: int) -> tuple[list[int], list[int], list[int]]:
    """(prompt lengths, tokens before, new tokens) of decodes, some far above the budget."""
    rows = int(random.integers(1, most + 1))
    prompts = random.integers(1, MAX_LEN // 2, rows)
    before = prompts + random.integers(0, MAX_LEN // 2, rows)
    return prompts.tolist(), before.tolist(), [1] * rows


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("waits", [False, True])
def test_padding_changes_no_decision(kind, waits, monkeypatch):
    """Whatever V1's arrays still say of requests that have left, and however starts are known."""
    random = np.random.default_rng(3)
    for _ in range(20):
        prompts, before, new = random_step(random, 5)
        found = []
        for padded in (None, MAX_ROWS):
            runner = Runner(kind)
            compactor = Compactor(runner, Streaming(SINKS, RECENT), {}, waits_for_pressure=waits)
            step = runner.batch(prompts, before, new, padded)
            output = scheduler_output({f"r{row}": 0 for row in range(len(new))})
            output.paged_kv_starts = {f"r{row}": prompts[row] for row in range(len(new))}
            events: list[Any] = []
            monkeypatch.setattr(compactor, "_compact", events.append)
            with compactor.step(output):
                gone = compactor.begin_batch(SPEC, ["layer.0"], step)
            rows = [each.rows.tolist() for each in events]
            found.append((gone[: len(new)].tolist(), rows))
            assert not gone[len(new) :].any()
        assert found[0] == found[1]
        assert found[0][0] == [evicted(*row) for row in zip(before, prompts, strict=True)]


def padded(step: Any, rows: int) -> Any:
    """The step as vLLM hands it to a graph of so many rows."""
    more = rows - step.num_reqs
    starts = torch.cat([step.query_start_loc, step.query_start_loc[-1:].expand(more)])
    lens = torch.cat([step.seq_lens, step.seq_lens.new_zeros(more)])
    table = step.block_table_tensor
    return step.replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
        num_reqs=rows,
        block_table_tensor=torch.cat([table, table.new_zeros((more, table.shape[1]))]),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["knorm", "keydiff", "value_merge", "pooling"])
def test_policies_that_look_at_entries_compact_a_padded_batch_alike(name, kind, monkeypatch):
    monkeypatch.setattr(layer_group, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(
        layer_group, "caches_of", lambda layers: ([each.kv_cache for each in layers], None)
    )
    policy = policy_cases.make(name, {}, SINKS, RECENT)
    left = []
    for rows in (None, 5):
        views = [view.div_(1e4) for view in caches()]
        layers = {name: attention_layer(view) for name, view in zip(LAYERS, views, strict=True)}
        make_runner, index = RUNNERS[kind]
        runner = make_runner()
        known = runner.input_batch if index is None else runner.req_states
        known.req_id_to_index = {"a": 0, "b": 1} if index is None else {"a": 3, "b": 1}
        known.req_ids = ["a", "b"]
        step = metadata(PAGE_SIZE, index)
        compactor = Compactor(runner, policy, layers)
        with compactor.step(scheduler_output(dict(zip("ab", BEFORE, strict=True)))):
            compactor.begin_batch(SPEC, LAYERS, step if rows is None else padded(step, rows))
        assert compactor.num_events == 2
        (stores,) = compactor.observer._stores.values()
        left.append([*views, *(part for store in stores for part in store.side.tensors.values())])
    assert all(map(torch.equal, *left))


WINDOW, KNOWN = policy_cases.WINDOW, policy_cases.CALIBRATED
NEEDS_NO_QUERIES = [
    *((name, {}) for name in ("streaming", "window", "random", "knorm", "keydiff", "learned")),
    ("pooling", {}),
    ("value_merge", {"of": "knorm"}),
    ("calibrated_attention", {"fading": "off", **KNOWN}),
]
NEEDS_QUERIES = [
    *((name, WINDOW) for name in ("snapkv", "attention", "hybrid", "past_future")),
    *((name, {}) for name in ("h2o", "lru", "tova")),
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


@pytest.mark.vllm
def test_batches_padded_by_vllms_runner(tiny, in_process, monkeypatch):
    """Decode steps as for a graph that nobody replays here: vLLM's runner pads them, and builders
    write their tables in every step. The tokens of the same engine without, and memory that stays
    where it is."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    config = {"policy": "pyramidal+knorm", "budget": 64, "recent_window": 8}
    prompts = [list(range(5, 5 + length)) for length in (20, 90, 150)]
    settings = {"block_size": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with engines.engine(tiny, config, max_model_len=512, **settings) as llm:
        plain = engines.generate(llm, prompts, 60)
        runner = engines.worker(llm).model_runner
        dispatch, num_padded = runner._determine_batch_execution_and_padding, []

        def padded(num_tokens: int, num_reqs: int, **more: Any) -> Any:
            found = dispatch(num_tokens=num_tokens, num_reqs=num_reqs, **more)
            if num_tokens != num_reqs:
                return found
            num_padded.append(num_reqs)
            rows = BatchDescriptor(MAX_ROWS, MAX_ROWS, uniform=True)
            return CUDAGraphMode.FULL, rows, *found[2:]

        monkeypatch.setattr(runner, "_determine_batch_execution_and_padding", padded)
        mode = CUDAGraphMode.FULL_AND_PIECEWISE
        monkeypatch.setattr(runner.vllm_config.compilation_config, "cudagraph_mode", mode)
        builders = [each.get_metadata_builder() for group in runner.attn_groups for each in group]
        where = [builder._tables._table.data_ptr() for builder in builders]
        assert len(set(where)) == len(builders) > 1
        assert engines.generate(llm, prompts, 60) == plain
        assert [builder._tables._table.data_ptr() for builder in builders] == where
        assert {1, 3} <= set(num_padded)
        assert all(not builder._tables._lens[3:MAX_ROWS].any() for builder in builders)
        assert engines.worker(llm).compactor.num_events > 0
