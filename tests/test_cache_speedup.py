"""`paged-kv bench cache-speedup` and benchmarks/hf_decode.py at their smallest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paged_kv import cli, results
from paged_kv.hf import PagedCache
from paged_kv.hf.driver.decoding import Decoder, dynamic_cache, interleaved

HF_DECODE = Path(__file__).parent.parent / "benchmarks" / "hf_decode.py"
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def test_all_decoders_make_the_same_tokens(model):
    rows = torch.randint(30, 200, (2, 70), generator=torch.Generator().manual_seed(0)).tolist()
    with PagedCache(model.config, "full") as paged:
        decoders = {
            "none": Decoder(model),
            "dynamic": Decoder(model, dynamic_cache(model), chunk=32),
            "paged": Decoder(model, paged, chunk=64),
        }
        for decoder in decoders.values():
            decoder.read(rows)
        seconds = interleaved(decoders, 20)
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(decoders, 20)
    assert all(step > 0 for steps in seconds.values() for step in steps)
    expected = decoders["none"].tokens
    assert expected.shape == (2, 90)
    for decoder in decoders.values():
        assert torch.equal(decoder.tokens, expected)


def test_a_line_for_each_length_and_a_plot(tiny, tmp_path, capsys):
    command = ["bench", "cache-speedup", "--model", tiny, "--lengths", "600", "40", "--rounds", "3"]
    assert cli.main([*command, "--out", str(tmp_path / "new")]) == 0
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [case["length"] for case in cases] == [40, 600]
    for case in cases:
        assert case["benchmark"] == "cache_speedup"
        assert set(results.FIELDS) | set(results.PROVENANCE) <= set(case)
        assert (case["score"], case["kept"]) == (case["speedup"], case["length"])
        assert case["bytes_per_token"] == 6 * 2 * 2 * 32 * 4  # in float32
        assert case["speedup"] == pytest.approx(case["uncached_ms"] / case["cached_ms"], rel=0.02)
    assert cases[1]["speedup"] > cases[0]["speedup"]
    assert (tmp_path / "new" / "cache_speedup.png").read_bytes().startswith(PNG)


def test_a_length_that_the_model_does_not_have(tiny, tmp_path, capsys):
    command = ["bench", "cache-speedup", "--model", tiny, "--lengths", "50", "2048"]
    assert cli.main([*command, "--out", str(tmp_path / "new")]) == 2
    message = "lengths 2048 with rounds 5: needs 2054 tokens, the model has 2048"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "nope"])
    assert error.value.code == 2
    assert "cache-speedup" in capsys.readouterr().err


def test_hf_decode_compares_with_transformers_own_cache(tiny):
    sizes = ["--context", "200", "--long-context", "300", "--budget", "100", "--rounds", "1"]
    which = ["--batches", "1", "2", "--dtypes", "float32", "--policies", "streaming", "h2o"]
    result = subprocess.run(
        [sys.executable, str(HF_DECODE), "--model", tiny, *sizes, *which],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    found = [(case["case"], case["policy"], case["batch"], case["tokens"]) for case in cases]
    assert found == [
        ("full", "full", 1, 200),
        ("full", "full", 2, 200),
        ("budget", "streaming", 1, 300),
        ("budget", "h2o", 1, 300),
    ]
    for case in cases:
        assert case["ratio"] > 0
        assert case["ratios"] == [case["ratio"]]
    entry = 6 * 2 * 2 * 32 * 4  # bytes of a token: layers, keys and values, heads, size, float32
    full, _, streaming, _ = (case["paged_bytes"] for case in cases)
    assert full >= 235 * entry
    assert 100 * entry <= streaming < (100 + 2 * 32) * entry
