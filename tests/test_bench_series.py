"""Rows of `paged-kv bench throughput` and `latency`: medians over rounds, ratios of each round."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from paged_kv import results
from paged_kv.bench import latency, series, throughput
from paged_kv.bench.cases import Load, read_cases
from paged_kv.bench.client import Served
from paged_kv.bench.rows import case_fields

LOAD = Load(input_len=100, output_len=20, requests=4, pool_tokens=320)


def served(tokens_per_second: float, itl: float = 1.0, preemptions: int = 0) -> Served:
    times = dict.fromkeys(series.TIMES, 10.0) | {"itl_ms": itl}
    return Served(2.0, tokens_per_second, times, 3, preemptions, 400)


def test_rows_have_medians_over_rounds_and_ratios_of_each(tiny):
    args = argparse.Namespace(model=Path(tiny))
    plain, policy = read_cases("plain,streaming", "96", "native", "always", None)
    turns = {
        (math.inf, plain): series.Series([served(10), served(40), served(20)], 0.012345),
        (math.inf, policy): series.Series([served(20, 4, 2), served(30, 5), served(60, 9)]),
    }
    first, second = series.make_rows(args, throughput.SCORE, LOAD, turns)
    assert set(results.FIELDS) | set(results.PROVENANCE) <= set(first)
    assert (first["score"], first["ratio"], first["idle_cpu"]) == (20, 1.0, 0.0123)
    # 20/10, 30/40, 60/20; the standard deviation of 20, 30, 60 by the root of 3
    assert (second["score"], second["ratios"], second["ratio"]) == (30, [2.0, 0.75, 3.0], 2.0)
    assert second["standard_error"] == pytest.approx(12.018504)
    assert (second["itl_ms"], second["preemptions"], second["samples"]) == (5, 0, 3)
    assert (second["seconds"], second["request_rate"], second["running"]) == (6, "inf", 3)
    # 120 tokens: whole pages of 32 go while more than 96 are left; 6 layers of 128 numbers
    assert (second["kept"], second["bytes_per_token"]) == (120, 6 * 128 * 2)
    assert (second["share"], second["pool_tokens"]) == (320 / (4 * 128), 320)
    json.dumps([first, second])


def test_what_is_kept_after_prompt_and_output(tiny):
    args, load = argparse.Namespace(model=Path(tiny)), Load(200, 56, 1, 1024)
    kept = {}
    for case in read_cases("plain,plain-fp8,streaming", "96", "native,int8", "always", None):
        row = case_fields(args, case, load)
        kept[case.label] = row["kept"], row["bytes_per_token"]
    entry = 6 * 2 * 2 * 32  # numbers: layers, keys and values, heads, size
    assert kept["plain"] == (256, 2 * entry)
    assert kept["plain-fp8"] == (256, entry)
    assert kept["streaming 96"] == (96, round(2 * entry * 96 / 256, 2))
    assert entry * 96 / 256 < kept["streaming 96 int8"][1] < 1.2 * entry * 96 / 256
    single = replace(load, dtype="float32")
    (plain,) = read_cases("plain", "96", "native", "always", None)
    row = case_fields(args, plain, single)
    assert (row["dtype"], row["kept"], row["bytes_per_token"]) == ("float32", 256, 4 * entry)
    assert single.pool_bytes(args.model) == 2 * load.pool_bytes(args.model) == 4 * entry * 1024
    (waiting,) = read_cases("streaming", "96", "native", "pressure", None)
    assert case_fields(args, waiting, load)["kept"] is None, "nobody knows beforehand"


def test_latency_is_scored_by_the_time_between_tokens():
    one = served(10, itl=7.5)
    assert (latency.SCORE.value(one), latency.SCORE.higher_is_better) == (7.5, False)
    assert throughput.SCORE.value(one) == 10


def test_a_time_of_0_has_no_ratio():
    plain = series.Series([served(10, itl=0.0), served(10, itl=2.0)])
    policy = series.Series([served(10, itl=1.0), served(10, itl=1.0)])
    assert policy.ratios(plain, lambda one: one.times["itl_ms"]) == []
    assert plain.ratios(policy, lambda one: one.times["itl_ms"]) == [0, 2]
