"""What several test files share: the models' directories, and settings for all."""

import os
from pathlib import Path

# Before torch is imported: threads that spin while they wait slow down a busy machine 20 times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # others use the cores, too: one each, and anyone
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import tiny_models
from hypothesis import settings

from paged_kv import models

settings.register_profile("paged_kv", deadline=None)  # the machine may be busy
settings.load_profile("paged_kv")


def pytest_collection_modifyitems(items):
    """Files that take long come first: nobody waits for the last one while a core is idle."""
    length: dict[Path, int] = {}
    for item in items:
        here = sum(item.get_closest_marker(name) is not None for name in ("slow", "vllm"))
        length[item.path] = max(here, length.get(item.path, 0))
    items.sort(key=lambda item: -length[item.path])


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, from the user's cache (made there on first use, 20 s)."""
    return models.smollm2()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The directory of a small random Llama, with weights and a tokenizer."""
    return tiny_models.saved("llama", tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture
def in_process(monkeypatch):
    """vLLM looks at a model's class in a process of its own, for CUDA's sake: 10 s each."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


@pytest.fixture
def without_kernels(monkeypatch):
    """Pages and attention are vLLM's, as on a machine that has no compiler."""
    from paged_kv.kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
