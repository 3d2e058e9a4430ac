"""`paged-kv bench memory`: the counts of one engine agree; figures that do not are named."""

from __future__ import annotations

import pytest

from paged_kv import cli, results
from paged_kv.bench import memory
from paged_kv.bench.cases import Load
from paged_kv.vllm.driver.workload import EngineInfo, MemoryReport

MIB = 1 << 20
LOAD = Load(input_len=100, output_len=20, requests=4, pool_tokens=1024)  # sequences of 160
KEPT = [64, 64, 120]
INFO = EngineInfo(63, MIB, 2048, 12.8, 12.8, 1.0)
REPORT = MemoryReport(
    pool_pages=64,
    tensor_bytes=64 * MIB,
    beside_bytes=MIB,
    grown_bytes=65 * MIB,
    num_tokens=120,
    held_pages=7,
    held_groups=[([0, 1], 64, 3), ([2], 120, 4)],
    peak_pages=20,
    peak_running=3,
    seconds=1.0,
)


def found(**changes):
    return memory.disagreements(KEPT, LOAD, 65 * MIB, INFO, REPORT._replace(**changes))


def test_figures_that_agree():
    assert found() == []
    assert found(grown_bytes=int(1.02 * 64 * MIB) + 4 * MIB) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pool_pages": 63},
            f"63 pages of {MIB} bytes are {63 * MIB} bytes, but the tensors have {64 * MIB}",
        ),
        (
            {"grown_bytes": 70 * MIB},
            f"the process grew by {70 * MIB} bytes for tensors of {64 * MIB} (tolerance 5536481)",
        ),
        ({"grown_bytes": 0}, f"the process grew by 0 bytes for tensors of {64 * MIB}"),
        (
            {"beside_bytes": 2 * MIB},
            f"tensors of {64 * MIB} bytes and {2 * MIB} bytes beside them are more than the "
            f"{65 * MIB} that the KV cache was given",
        ),
        ({"num_tokens": 119}, "counted at 119 tokens, not 120"),
        (
            {"held_groups": [([0, 1], 65, 3), ([2], 120, 4)]},
            "the plan keeps [64, 64, 120] entries by layer, the engine [65, 65, 120]",
        ),
        ({"held_pages": 8}, "the layer groups hold [3, 4] pages, 8 of the pool are in use"),
        (
            {"held_groups": [([0, 1], 64, 4), ([2], 120, 3)]},
            "layers [0, 1] hold 64 entries in 4 pages",
        ),
    ],
)
def test_figures_that_do_not(changes, message):
    assert any(text.startswith(message) for text in found(**changes)), found(**changes)


def test_vllms_own_figures_must_agree():
    info = INFO._replace(kv_tokens=2050)
    (text,) = memory.disagreements(KEPT, LOAD, 65 * MIB, info, REPORT)
    assert text == "vLLM reports 2050 tokens, but 12.80 sequences of 160"


def test_a_disagreement_is_an_error_and_no_result(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    kept = [120] * 6
    right = REPORT._replace(held_groups=[(list(range(6)), 120, 4)], held_pages=4, pool_pages=1024)
    reports = iter([right._replace(pool_pages=60), right])
    info = INFO._replace(page_bytes=65536, num_pages=1023)
    monkeypatch.setattr(memory, "measure", lambda *_: (info, next(reports)))
    monkeypatch.setattr(Load, "pool_bytes", lambda *_: 65 * MIB)
    line = ["bench", "memory", "--model", tiny, "--policy", "plain,full", "--pool", "1024"]
    line += ["--input-len", "100", "--output-len", "20", "--requests", "4", "--out", str(out)]
    assert cli.main(line) == 1
    assert "plain, input-len 100: 60 pages of 65536 bytes" in capsys.readouterr().err
    (row,) = results.read([out])
    assert (row["policy"], row["kept_by_layer"], row["score"]) == ("full", kept, 4 * 65536)
    assert (row["metric"], row["higher_is_better"]) == ("bytes_per_sequence", False)


@pytest.mark.vllm
def test_the_counts_of_an_engine_agree(tiny, tmp_path):
    out = tmp_path / "rows.jsonl"
    line = ["bench", "memory", "--model", tiny, "--policy", "pyramidal+snapkv", "--budget", "128"]
    line += ["--policy-config", '{"pyramid_steps": 3}', "--page-format", "int8", "--pool", "12.0"]
    line += ["--input-len", "320", "--output-len", "40", "--requests", "4", "--out", str(out)]
    assert cli.main(line) == 0
    (row,) = results.read([out])
    assert row["kept_by_layer"] == sorted(row["kept_by_layer"], reverse=True)
    assert row["kept"] == sum(row["kept_by_layer"]) / 6
    assert len(set(row["kept_by_layer"])) == 3
    assert row["score"] == row["held_pages"] * row["page_bytes"]
    assert row["tensor_bytes"] == row["pool_pages"] * row["page_bytes"]
    stored = row["bytes_per_token"] * 360
    assert stored <= row["score"] < stored + 2 * 6 * row["page_bytes"] / 2
    assert row["grown_mb"] == pytest.approx(row["tensor_bytes"] / 1e6, abs=4.5)
    assert row["beside_bytes"] > 0
    assert row["peak_running"] == 4
