"""Batches that vLLM pads for a CUDA graph: rows of length 0 decide nothing."""

from __future__ import annotations

from typing import Any

import engines
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
)
from graph_steps import MAX_ROWS, Runner, evicted, random_step

from paged_kv.policies.streaming import Streaming
from paged_kv.vllm.worker import layer_group
from paged_kv.vllm.worker.step import Compactor

RECENT = 8
KINDS = ["V1", "V2"]


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
