"""The Triton kernels, as far as they can be tested without a GPU: run in Triton's interpreter, and
compiled for A100 (sm_80) and H100 (sm_90)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and vLLM")

TESTS = Path(__file__).parent
EXHAUSTIVE = pytest.mark.exhaustive
SHARED_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10}  # bytes that a program may have
MOST_REGISTERS = 255


def run(*arguments: str, **environment: str) -> str:
    """A process of its own: Triton is imported for the interpreter or for a GPU, not for both."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=TESTS.parent, env=environment
    )
    assert not done.returncode, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chosen", ["not exhaustive", pytest.param("exhaustive", marks=EXHAUSTIVE)])
def test_in_the_interpreter(chosen):
    """See triton_cases.py."""
    pytest_run = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", chosen]
    out = run(*pytest_run, str(TESTS / "support" / "triton_cases.py"), TRITON_INTERPRET="1")
    assert " passed" in out
    assert " skipped" not in out


FEW = ("--sizes", "128", "--dtypes", "bfloat16", "--formats", "int8", "int4")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chosen", [FEW, pytest.param((), marks=EXHAUSTIVE)], ids=["few", "all"])
@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiled_kernels_fit(arch, chosen):
    """No register is spilled, shared memory suffices; what encodes numbers rounds as the codecs."""
    out = run(
        str(TESTS / "support" / "triton_resources.py"),
        "--arch",
        arch,
        *chosen,
        TRITON_INTERPRET="0",
    )
    kernels = [json.loads(line) for line in out.splitlines()]
    names = ["write", "store", "move", "gather", "segment", "combine", "score", "kept"]
    names += ["total", "mass"]
    assert {kernel["kernel"] for kernel in kernels} >= {f"{name}_kernel" for name in names}
    for kernel in kernels:
        assert kernel["arch"] == f"sm{arch}"
        assert kernel["spilled"] == 0, kernel
        assert 0 < kernel["registers"] <= MOST_REGISTERS, kernel
        assert kernel["shared"] <= SHARED_LIMIT[kernel["arch"]], kernel
        if kernel["kernel"] in ("write_kernel", "store_kernel", "gather_kernel"):
            assert kernel["inexact"] == 0, kernel
    assert any(kernel["inexact"] for kernel in kernels), "or the pattern finds nothing"


def test_triton_is_imported_when_there_is_a_gpu():
    code = "import sys, paged_kv.kernels.ops; print([m for m in sys.modules if 'triton' in m])"
    assert "paged_kv.kernels.triton" not in run("-c", code)
