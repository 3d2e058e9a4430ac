"""In which dtype `paged-kv bench` and the demo run a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from paged_kv import cli
from paged_kv.bench import demo, serving
from paged_kv.bench.cases import read_cases, read_loads
from paged_kv.bench.settings import resolved_dtype


@pytest.mark.parametrize(
    ("cuda", "bf16", "avx512", "found"),
    [
        (True, True, False, "bfloat16"),
        (True, False, True, "float16"),
        (False, False, True, "bfloat16"),
        (False, False, False, "float32"),
    ],
    ids=["GPU", "older GPU", "CPU", "older CPU"],
)
def test_auto_is_what_the_machine_computes_with(monkeypatch, cuda, bf16, avx512, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: avx512)
    assert resolved_dtype("auto") == found
    assert resolved_dtype("float16") == "float16"


def test_torch_knows_of_bfloat16():
    """The operator is torch's own, without a promise."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


def test_servers_run_in_it_and_the_pool_fits_it(tiny):
    (case,) = read_cases("plain", "96", "native", "always", None)
    sizes = {}
    for dtype in ("bfloat16", "float32"):
        (load,) = read_loads(Path(tiny), [100], 20, [4], [600], dtype)
        flags = serving.server_flags(Path(tiny), case, load)
        assert flags[flags.index("--dtype") + 1] == dtype
        sizes[dtype] = int(flags[flags.index("--kv-cache-memory-bytes") + 1])
    assert sizes["float32"] == 2 * sizes["bfloat16"]


def test_the_demo_s_engines_run_in_it(tiny):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    found = {}
    for dtype in ("bfloat16", "float32"):
        args = parser.parse_args(["--dtype", dtype])
        settings = demo._settings(args, Path(tiny), ["a text"], {})
        assert settings.dtype == dtype
        found[dtype] = settings.pool_bytes
    assert found["float32"] == 2 * found["bfloat16"]


def test_an_unknown_dtype_is_refused(tiny, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "memory", "--model", tiny, "--dtype", "half"])
    assert exit.value.code == 2
    assert "invalid choice: 'half'" in capsys.readouterr().err
