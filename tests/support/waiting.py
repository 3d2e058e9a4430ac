"""Steps on a device that computes nothing, so that nobody can wait for it; run as a script.

PyTorch's fake tensors have shapes and devices, no values: whatever needs a value on the host (item,
nonzero, masks as indices, lists) raises, and so do tensors of different devices that meet. What
remains are copies: to the host none is allowed; to the device those that nobody waits for, from
pinned memory. In steps and compactions the torch reference takes the place of our kernels for GPUs;
what these do before they are launched is called by itself (waiting_kernels).

The device is PyTorch's for backends in Python, which changes the process: hence a script.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import numpy as np
import policy_cases
import query_files
import torch
import torch.utils.backend_registration
import waiting_kernels
from gpu_steps import (
    AFTER,
    BEFORE,
    HEAD_SIZE,
    NUM_PAGES,
    PAGE_SIZE,
    QUERY_HEADS,
    SINKS,
    SPEC,
    attention_layer,
    metadata,
    scheduler_output,
    v1_runner,
)
from policy_cases import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from paged_kv.kernels.rotary import Rotary
from paged_kv.store.compaction import compact
from paged_kv.store.holding import Holding
from paged_kv.store.query_gathering import SERVED_TOKENS
from paged_kv.vllm.worker import layer_group
from paged_kv.vllm.worker import step as worker_step
from paged_kv.vllm.worker.block_table import RetainedTables
from paged_kv.vllm.worker.step import Compactor

LAYER = "layer.0"
DEVICE = torch.device("privateuseone:0")
aten = torch.ops.aten


class Waited(Exception):
    """Somebody would wait for the device."""


class _Fake(FakeTensorMode):
    avoid_device_init = True  # else numbers that are known would be copied in earnest


class _Copies(TorchDispatchMode):
    """Refuses copies that somebody waits for.

    Args:
        first: of a first step: what is copied to the device once and for all may be waited for.
    """

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # in inference mode operations come that consist of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            self._check(func, args[0], kwargs["device"], kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            ahead = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._check(func, args[1], args[0].device, ahead)
        elif func in (aten.index.Tensor, aten.index_put_.default):
            for index in args[1]:
                if index is not None:
                    self._check(func, index, args[0].device, False)
        return func(*args, **kwargs)

    def _check(self, func: Any, source: torch.Tensor, target: torch.device, ahead: bool) -> None:
        if source.device.type == target.type:
            return
        if target.type == "cpu":
            raise Waited(f"{func}: a copy to the host")
        pinned = getattr(source, "is_pinned_here", False)
        if not self.first and not (ahead and pinned):
            raise Waited(f"{func}: a copy from pageable memory, or a blocking one")


def _pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    pinned = torch.empty_like(tensor)
    pinned.is_pinned_here = True  # type: ignore[attr-defined]
    return pinned


@contextmanager
def watched(first: bool = False) -> Any:
    """What happens in here must leave the device alone; see _Copies."""
    pin_memory = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign]
    try:
        with _Copies(first):
            yield
    finally:
        torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign]


def on_device(step: Any) -> Any:
    """A step's metadata with what vLLM has on a GPU there, and the rest as numbers."""
    fields = {}
    for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
        fields[name] = torch.empty_like(getattr(step, name), device=DEVICE)
    # Tensors would become fake as soon as they are touched.
    for name, numbers in (
        ("query_start_loc_cpu", [0, 30, 31]),
        ("seq_lens_cpu_upper_bound", AFTER),
    ):
        fields[name] = SimpleNamespace(numpy=np.array(numbers, dtype=np.int32).copy)
    return step.replace(**fields)


def run_policy(policy: Any, step: Any) -> None:
    """Steps of a worker in which two sequences compact, and one more compaction as a cache's."""
    compactor, tables = worker(policy)
    shown = torch.zeros((31, QUERY_HEADS, HEAD_SIZE), device=DEVICE)
    keys = torch.zeros((31, SPEC.num_kv_heads, HEAD_SIZE), device=DEVICE)
    for turn in range(2):
        output = scheduler_output(dict(zip("ab", BEFORE, strict=True)) if turn == 0 else {})
        output.total_num_scheduled_tokens = SERVED_TOKENS // 2  # which suffice
        with watched(first=turn == 0), compactor.step(output):
            evicted = compactor.begin_batch(SPEC, [LAYER], step)
            tables.skip(step, evicted, PAGE_SIZE)
            tables.skip(step, np.zeros_like(evicted), PAGE_SIZE)
            compactor.observer.observe(LAYER, shown, keys)
    assert compactor.num_events == 4
    if not policy.is_positional:
        (store,) = compactor.observer.stores_of((LAYER,))
        with watched():
            compact(policy, store, holding(), "tail", compactor.observer.facts)
            if store.ring is not None:
                store.ring.select_rows(np.array([1, 0, 2]))


def worker(policy: Any) -> tuple[Any, Any]:
    """A compactor over pages on the device, and the tables of a metadata builder."""
    shape = NUM_PAGES, SPEC.num_kv_heads, PAGE_SIZE, 2 * HEAD_SIZE
    layers = {LAYER: attention_layer(torch.zeros(shape, device=DEVICE))}
    runner = v1_runner()
    runner.input_batch.req_ids = ["a", "b"]
    runner.input_batch.req_id_to_index = {"a": 0, "b": 1}
    runner.get_model = lambda: None
    compactor = Compactor(runner, policy, layers)
    compactor.requests.grow(2)
    return compactor, RetainedTables(4)


def holding() -> Holding:
    """Two sequences of a cache with tables of its own."""
    counts = np.array([90, 80])
    zeros = np.zeros_like(counts)
    return Holding(
        layers=np.zeros(1, dtype=np.int64),
        pages=torch.zeros((1, 2, 6), dtype=torch.int64, device=DEVICE),
        num_tokens=counts,
        num_entries=counts,
        num_losers=np.array([16, 32]),
        rated=zeros,
        tail=zeros,
        rows=np.array([1, 2]),
        first=zeros,
        owners=["a", "b"],
    )


def what_waits(policy: Any, step: Any) -> str | None:
    """What a policy would wait for."""
    with _Fake(allow_non_fake_inputs=True):
        rotary = Rotary(torch.ones(HEAD_SIZE // 2, device=DEVICE), 1.0, True)
        worker_step.find_rotary = lambda model, names: rotary  # type: ignore[assignment]
        try:
            run_policy(policy, on_device(step))
        except Exception:  # whatever it is: the test shows it
            return traceback.format_exc()
    return None


def what_calls_wait(run: Callable[[], None]) -> str | None:
    """What the second of two calls would wait for: kernels may keep what the first one copied."""
    with _Fake(allow_non_fake_inputs=True), waiting_kernels.without_launches():
        try:
            with watched(first=True):
                run()
            with watched():
                run()
        except Exception:  # as above
            return traceback.format_exc()
    return None


def main() -> None:
    """Prints what waits, [name, options, what for or null] of each, and which kernels came up."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend()
    layer_group.get_tensor_model_parallel_rank = lambda: 0  # type: ignore[assignment]
    step, groups = metadata(), QUERY_HEADS // SPEC.num_kv_heads
    statistics = query_files.shared(1, SPEC.num_kv_heads, groups, HEAD_SIZE)
    found = []
    gathering = [("calibrated_attention", {"fading": "off"})]
    every = [(name, options) for name, cases in CASES.items() for options in cases.engine]
    for name, options in every + gathering:
        known = {"statistics": statistics} if "statistics" in options else {}
        policy = policy_cases.make(name, {**options, **known}, SINKS, 8)
        found.append((name, str(options), what_waits(policy, step)))
    for call in waiting_kernels.calls(DEVICE):
        found.append((call.name, call.options, what_calls_wait(call.run)))
    json.dump({"found": found, "launched": sorted(waiting_kernels.launched)}, sys.stdout)


if __name__ == "__main__":
    main()
