"""All C++ kernels under the address and undefined behaviour sanitizers, in their own program."""

import os
import subprocess
from pathlib import Path

import pytest
from kernel_builds import BUILDS, COMPILER

from paged_kv.kernels.cpu import builds

HERE = Path(__file__).parent
FLAGS = ["-O0", "-std=c++17", "-fopenmp", "-w"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
OPTIONS = {
    "avx512": ["-DPAGED_KV_AVX512", *AVX512],
    "avx2": ["-DPAGED_KV_AVX2", *AVX2],
    "portable": [],
}


def best():
    """The build with the widest vectors that this CPU has: the easiest to read too far with."""
    return next(name for name in BUILDS if not builds.CPU_BITS[name] & ~builds.cpu_bits())


def run_sanitized(build: str, folder: Path, rounds: int, seed: int) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = folder / "sanitized"
    sources = ["-I", str(builds.FOLDER), str(HERE / "cpp" / "sanitized.cpp"), "-o", str(program)]
    subprocess.run([COMPILER, *FLAGS, *OPTIONS[build], *sources], check=True)
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    env.pop("LD_PRELOAD", None)  # vLLM sets it; the sanitizer must come first
    command = [str(program), str(seed), str(rounds)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"seed {seed}: {result.stderr[-3000:]}"


def test_kernels_stay_inside_their_memory(tmp_path):
    run_sanitized(best(), tmp_path, rounds=30, seed=int.from_bytes(os.urandom(4), "little"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_stays_inside_its_memory(build, tmp_path):
    if builds.CPU_BITS[build] & ~builds.cpu_bits():
        pytest.skip(builds.OTHER_CPU)
    run_sanitized(build, tmp_path, rounds=300, seed=int.from_bytes(os.urandom(4), "little"))
