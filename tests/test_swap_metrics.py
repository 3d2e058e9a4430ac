"""The swap's counters on their way from the scheduler to vLLM's log and to Prometheus."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
from engines import engine, scheduler
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm import SamplingParams
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from paged_kv.vllm.swap import ledger
from paged_kv.vllm.swap.metrics import (
    COUNTERS,
    FALLBACK,
    PREFIX,
    REASONS,
    Meter,
    SwapPromMetrics,
    SwapStats,
)

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def prometheus():
    unregister_vllm_metrics()
    types = {kind: kind for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    yield SwapPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"]})
    unregister_vllm_metrics()


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:paged_kv_swap_{name}", {**LABELS, **labels})


def test_only_what_is_new():
    meter = Meter()
    assert meter.read({}, (0, 0)).is_empty()
    first = meter.read({"restored_tokens": 5, "fallback_full": 1}, (3, 0))
    assert first.data == {
        "counts": {"restored_tokens": 5, "fallback_full": 1},
        "used": {"host": 3, "file": 0},
    }
    assert meter.read({"restored_tokens": 5, "fallback_full": 1}, (3, 0)).is_empty()
    # An abort: slots are given back, and nothing is counted.
    second = meter.read({"restored_tokens": 7, "fallback_full": 1}, (0, 0))
    assert second.data == {"counts": {"restored_tokens": 2}, "used": {"host": 0, "file": 0}}
    total = SwapStats(data=first.data).aggregate(second)
    assert total.reduce() == {
        "restored_tokens": 7,
        "fallback_full": 1,
        "host_slots_used": 0,
        "file_slots_used": 0,
    }
    total.reset()
    assert total.is_empty()


def test_prometheus_has_everything_that_is_counted(prometheus):
    reasons = [ledger.FULL, ledger.IO_ERROR, ledger.STALE, ledger.RESET]
    assert sorted(reasons) == sorted(f"{FALLBACK}{reason}" for reason in REASONS)
    assert value("out_requests_total") == value("host_slots_used") == 0  # from the start
    for number, name in enumerate([*COUNTERS, *reasons], 1):
        stats = Meter().read({name: number}, (number, 2 * number))
        for _ in range(2):
            prometheus.observe(stats.data)
        if name in COUNTERS:
            assert value(f"{name.removeprefix('swapped_')}_total") == 2 * number
        else:
            reason = name.removeprefix(FALLBACK)
            assert value("fallbacks_total", reason=reason) == 2 * number
        assert value("host_slots_used") == number
        assert value("file_slots_used") == 2 * number


@pytest.mark.vllm
def test_an_engine_reports_them(tmp_path):
    swap = {"policy": "full", "swap_space": 0.01}
    prompts = [[3 + index] * 64 for index in range(4)]
    model = tiny_models.saved("llama", tmp_path, tokenizer=True)
    with engine(model, swap, disable_log_stats=False) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
        for index, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        for step in range(100):
            if step == 8:
                llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            llm.llm_engine.step()
        assert not llm.llm_engine.has_unfinished_requests()
        counts = scheduler(llm).connector.ledger.counts
        samples = {
            sample.name: sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name.startswith(PREFIX) and "reason" not in sample.labels
        }
    assert counts["swapped_out_requests"] == counts["swapped_in_requests"] == 4
    for name in COUNTERS:
        assert samples[f"{PREFIX}_{name.removeprefix('swapped_')}_total"] == counts[name]
    assert samples[f"{PREFIX}_restored_tokens_total"] > 4 * 64
    assert samples[f"{PREFIX}_host_slots_used"] == 0
