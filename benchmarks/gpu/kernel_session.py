"""A pytest plugin for the processes that run kernels_right's tests: their time and their inputs."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

import pytest
import torch

SEED, END = "PAGED_KV_SEED", "PAGED_KV_END"


def environment(part: Any) -> dict[str, str]:
    """What pytest_runtest_setup reads, of a common.Part."""
    return {SEED: str(part.seed), END: str(time.time() + part.seconds_left)}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what would begin too late; each test has inputs of its own, in any process."""
    if time.time() >= float(os.environ[END]):
        pytest.skip("the time is up")
    torch.manual_seed(int(os.environ[SEED]) ^ zlib.crc32(item.nodeid.encode()))
