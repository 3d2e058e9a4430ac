"""The builds of the C++ kernels that this machine has, for tests of all of them."""

import shutil
from functools import lru_cache

import pytest

from paged_kv.kernels.cpu import CompiledKernels, builds

BUILDS = builds.BUILDS
COMPILER = shutil.which("c++") or shutil.which("g++")


@lru_cache
def kernels_of(build: str) -> CompiledKernels:
    """Skips the test where the CPU cannot run the build, or there is no compiler to make it."""
    found, why = builds.load(build)
    if why == builds.OTHER_CPU or (why == builds.NOT_BUILT and COMPILER is None):
        pytest.skip(f"{build}: {why}")
    assert found is not None, f"{build}: {why}; make setup builds it"
    return CompiledKernels(found)
