"""The starts of a batch in both of vLLM's runners: rows by name (V1), or by an index (V2)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import numpy as np
import pytest

from paged_kv.core.schedule import NEVER
from paged_kv.vllm.worker.starts import Starts

NAMES = ["a", "b", "c"]


def runner(is_v2: bool, names: list[str]) -> Any:
    """What Starts reads of a runner whose batch has these requests."""
    if not is_v2:
        lens = np.array([7, 8, 9, 0], dtype=np.int32)
        return SimpleNamespace(input_batch=SimpleNamespace(req_ids=names, num_prompt_tokens=lens))
    lens = SimpleNamespace(np=np.array([0, 9, 8, 7], dtype=np.int32))
    states = SimpleNamespace(prompt_len=lens, index_to_req_id={3: "a", 2: "b", 1: "c"})
    return SimpleNamespace(req_states=states)


def batch(is_v2: bool, names: list[str]) -> Any:
    index = {"a": 3, "b": 2, "c": 1}
    rows = np.array([index[name] for name in names]) if is_v2 else None
    return SimpleNamespace(num_reqs=len(names), req_idx=rows)


def output(starts: dict[str, int] | None = None, finished: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished), paged_kv_starts=starts or {})


@pytest.mark.parametrize("is_v2", [False, True])
def test_without_pressure_they_are_the_ends_of_prompts(is_v2):
    starts = Starts(runner(is_v2, NAMES), waits_for_pressure=False)
    starts.begin_step(output())
    found, fresh = starts.of_batch(batch(is_v2, NAMES))
    assert found.tolist() == [7, 8, 9]
    assert found.dtype == np.int64
    assert not fresh.size


@pytest.mark.parametrize("is_v2", [False, True])
def test_under_pressure_they_are_what_was_told(is_v2):
    starts = Starts(runner(is_v2, NAMES), waits_for_pressure=True)
    starts.begin_step(output())
    assert starts.of_batch(batch(is_v2, NAMES))[0].tolist() == [NEVER] * 3
    starts.begin_step(output({"b": 40, "c": 1 << 40}))
    for _ in range(2):  # each layer group asks
        found, fresh = starts.of_batch(batch(is_v2, NAMES))
        assert found.tolist() == [NEVER, 40, 1 << 40]
        assert fresh.tolist() == [1, 2]
    starts.begin_step(output(finished=("c",)))
    found, fresh = starts.of_batch(batch(is_v2, NAMES))
    assert found.tolist() == [NEVER, 40, NEVER]
    assert not fresh.size


def test_who_was_not_in_the_batch_is_new_when_it_comes():
    """Its side data are set anew in the first step in which it runs, whenever that is."""
    both = runner(False, ["a", "b"])
    starts = Starts(both, waits_for_pressure=True)
    starts.begin_step(output({"a": 40, "b": 50}))
    both.input_batch.req_ids = ["b"]
    assert starts.of_batch(batch(False, ["b"]))[1].tolist() == [0]
    starts.begin_step(output())
    both.input_batch.req_ids = ["a", "b"]
    assert starts.of_batch(batch(False, ["a", "b"]))[1].tolist() == [0]
