"""Policies that look at entries, in the layouts and with the runners of GPUs, on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import numpy as np
import pytest
import torch
from gpu_steps import (
    AFTER,
    BEFORE,
    CASES,
    EVICTED_AFTER,
    EVICTED_BEFORE,
    HEAD_SIZE,
    LAYERS,
    LAYOUTS,
    PAGE_SIZE,
    QUERY_HEADS,
    RUNNERS,
    SINKS,
    SPEC,
    attention_layer,
    caches,
    entries,
    metadata,
    scheduler_output,
)

from paged_kv.policies.knorm import KNorm
from paged_kv.policies.snapkv import SnapKV
from paged_kv.policies.value_merge import ValueMerge
from paged_kv.vllm.worker import layer_group
from paged_kv.vllm.worker.step import Compactor

RECENT, KV_HEADS = 8, 2


@pytest.fixture
def make_compactor(monkeypatch) -> Any:
    """A compactor over pages of one layout; the sequences' earlier slots hold their positions."""
    monkeypatch.setattr(layer_group, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(
        layer_group, "caches_of", lambda layers: ([layer.kv_cache for layer in layers], None)
    )

    def make(policy: Any, layout: str, kernel_page_size: int, runner: str) -> Any:
        views = [view / 1e4 for view in caches(layout, kernel_page_size)]
        views = caches(layout, kernel_page_size)
        for view in views:
            view.div_(1e4)
        layers = {name: attention_layer(view) for name, view in zip(LAYERS, views, strict=True)}
        built, req_idx = RUNNERS[runner]
        made = built()
        if req_idx is None:
            made.input_batch.req_ids = ["a", "b"]
            made.input_batch.req_id_to_index = {"a": 0, "b": 1}
        else:
            made.req_states.req_id_to_index = {"a": 3, "b": 1}
        compactor = Compactor(made, policy, layers)
        return compactor, views, metadata(kernel_page_size, req_idx)

    return make


def run_step(compactor: Any, step: Any, kernel_page_size: int, query: torch.Tensor) -> None:
    spec = SPEC.copy_with_new_block_size(kernel_page_size)
    # As if both had been hits: their slots before this step hold what their positions say.
    with compactor.step(scheduler_output(dict(zip("ab", BEFORE, strict=True)))):
        compactor.begin_batch(spec, LAYERS, step)
        for name in LAYERS:
            compactor.observer.observe(name, query, query)  # keys are for gathering


def survivors(held: torch.Tensor, row: int, losers: set[int]) -> list[list[float]]:
    """What must be left of a head's [slots, content] of a sequence, in any order."""
    kept = [slot for slot in range(EVICTED_BEFORE[row], AFTER[row]) if slot not in losers]
    return sorted(held[kept].tolist())


def free(row: int) -> list[int]:
    return [s for s in range(EVICTED_BEFORE[row], AFTER[row]) if SINKS <= s < AFTER[row] - RECENT]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("layout", "kernel_page_size"), CASES)
def test_every_head_keeps_its_own(layout, kernel_page_size, runner, make_compactor):
    policy = KNorm(SINKS, RECENT)
    compactor, views, step = make_compactor(policy, layout, kernel_page_size, runner)
    table = step.block_table_tensor
    before = [[entries(view, table, row) for row in range(2)] for view in views]
    run_step(compactor, step, kernel_page_size, torch.randn(31, QUERY_HEADS, HEAD_SIZE))
    assert compactor.num_events == 2
    for view, rows in zip(views, before, strict=True):
        for row, entry in enumerate(rows):
            left = entries(view, table, row)[EVICTED_AFTER[row] : AFTER[row]]
            for head in range(KV_HEADS):
                norms = entry[:, head, :HEAD_SIZE].norm(dim=-1)
                count = EVICTED_AFTER[row] - EVICTED_BEFORE[row]
                losers = set(sorted(free(row), key=lambda slot: -norms[slot])[:count])
                found = sorted(left[:, head].tolist())
                assert found == survivors(entry[:, head], row, losers)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("layout", "kernel_page_size"), CASES[:2])
def test_queries_are_found_again(layout, kernel_page_size, runner, make_compactor, monkeypatch):
    """Each request's ring holds its own last queries, whatever its row in the batch."""
    policy = SnapKV(SINKS, RECENT, {"observation_window": 8})
    seen = {}

    def compact(region):
        for event, num_tokens in enumerate(region.num_tokens.tolist()):
            order = region.queries.positions[event].argsort()
            positions = region.queries.positions[event, order]
            seen[num_tokens] = positions, region.queries.states[:, event][..., order, :]
        return SnapKV.compact(policy, region)

    monkeypatch.setattr(policy, "compact", compact)
    compactor, _, step = make_compactor(policy, layout, kernel_page_size, runner)
    query = torch.randn(31, QUERY_HEADS, HEAD_SIZE)
    run_step(compactor, step, kernel_page_size, query)
    positions, states = seen[100]
    assert positions.tolist() == list(range(92, 100))
    expected = query[22:30].unflatten(1, (KV_HEADS, -1)).movedim(0, 2)
    assert torch.equal(states, expected.expand_as(states))
    positions, states = seen[80]  # one token in this step; the ring knows no earlier ones
    assert positions.tolist() == [-1] * 7 + [79]
    assert torch.equal(
        states[..., -1, :], query[30].unflatten(0, (KV_HEADS, -1)).expand(3, -1, -1, -1)
    )


def test_queries_that_vllm_has_quantized_get_their_scale(make_compactor):
    """With an fp8 cache its backends on GPUs take fp8 queries, divided by a checkpoint's scale."""
    policy = SnapKV(SINKS, RECENT, {"observation_window": 8})
    query = torch.randn(31, QUERY_HEADS, HEAD_SIZE)
    rings = []
    for scale in (None, 0.25):
        compactor, _, step = make_compactor(policy, LAYOUTS[0], PAGE_SIZE, "V1")
        given = query
        if scale is not None:
            given = (query / scale).to(torch.float8_e4m3fn)
            for layer in compactor.observer.layers.values():
                layer.query_quant, layer._q_scale = object(), torch.tensor(scale)
        run_step(compactor, step, PAGE_SIZE, given)
        ((store,),) = compactor.observer._stores.values()
        rings.append(store.ring.tensor.clone())
    assert rings[0].abs().sum() > 0
    torch.testing.assert_close(rings[1], rings[0], rtol=2**-4, atol=1e-2)  # fp8 has 3 bits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_values_are_written(layout, make_compactor):
    """Nothing is lost: values weighted by their tokens add up to what they were."""
    policy = ValueMerge(KNorm(SINKS, RECENT), {"threshold": -1.0})
    compactor, views, step = make_compactor(policy, layout, PAGE_SIZE, "V1")
    table = step.block_table_tensor
    before = [[entries(view, table, row) for row in range(2)] for view in views]
    run_step(compactor, step, PAGE_SIZE, torch.randn(31, QUERY_HEADS, HEAD_SIZE))
    ((store,),) = compactor.observer._stores.values()
    for index, (view, rows) in enumerate(zip(views, before, strict=True)):
        weights = store.side.tensors["weights"][index][..., None]
        for row, entry in enumerate(rows):
            span = slice(EVICTED_AFTER[row], AFTER[row])
            values = entries(view, table, row)[span, :, HEAD_SIZE:]
            weight = entries(weights, table, row)[span]
            assert (weight.sum(0) == AFTER[row] - EVICTED_BEFORE[row]).all()
            total = entry[EVICTED_BEFORE[row] : AFTER[row], :, HEAD_SIZE:].sum(0)
            torch.testing.assert_close((values * weight).sum(0), total)


def test_rows_are_given_back():
    """To a request whose first window begins; one that ends or is preempted leaves its row."""
    from paged_kv.core.schedule import Schedule
    from paged_kv.vllm.worker.requests import NOBODY, RequestRows

    batch = SimpleNamespace(req_ids=[], req_id_to_index={})
    rows = RequestRows(SimpleNamespace(input_batch=batch), window=4)
    rows.grow(2)
    lengths: dict[str, int] = {}

    def step(new: dict[str, int], gone: str = "", preempted: str = "", more: int = 1) -> dict:
        made = scheduler_output(dict.fromkeys(new, 0))
        made.finished_req_ids, made.preempted_req_ids = set(gone), set(preempted)
        rows.begin_step(made)
        batch.req_ids = [*new, *(name for name in batch.req_ids if name not in gone + preempted)]
        batch.req_id_to_index = {name: index for index, name in enumerate(batch.req_ids)}
        before = [0 if name in new else lengths[name] for name in batch.req_ids]
        lengths.update({name: lengths[name] + more for name in batch.req_ids if name not in new})
        lengths.update(new)
        metadata = SimpleNamespace(req_idx=None, num_reqs=len(batch.req_ids))
        assert sorted(rows.begin_batch(metadata)) == list(range(len(new)))
        after = [lengths[name] for name in batch.req_ids]
        arrays = (np.array(numbers) for numbers in ([1] * len(after), before, after))
        found = rows.of_batch(metadata, Schedule(8, 16), *arrays)  # compacts from 24 tokens on
        return dict(zip(batch.req_ids, found.tolist(), strict=True))

    assert step({"a": 19}) == {"a": NOBODY}
    assert step({"b": 3})["b"] == NOBODY
    first = step({})["a"]  # 21 tokens: the queries 20 to 23 are its window
    assert first != NOBODY
    assert rows.first_token[first] == 20
    assert step({}, more=20)["b"] not in (first, NOBODY)
    assert step({"c": 30}, gone="a")["c"] == first
    assert rows.first_token[first] == 0
    assert step({"d": 40}, preempted="c")["d"] == first
    assert rows.num_rows == 3
    late = step({"e": 50})["e"]  # one more than was expected
    assert late >= 3
    assert rows.num_rows > 3
