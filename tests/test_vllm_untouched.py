"""Nothing happens to vLLM without being asked: by imports, by the plugin, without a policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import engines  # noqa: F401  vLLM's environment
import pytest
import tiny_models

UNTOUCHED = """
import pkgutil, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as specs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM

def state():
    classes = (EngineArgs, InputProcessor, Attention, Scheduler, AsyncLLM)
    return [dict(vars(cls)) for cls in classes] + [dict(specs)]

before = state()
import paged_kv, paged_kv.vllm
for module in pkgutil.walk_packages(paged_kv.vllm.__path__, "paged_kv.vllm."):
    __import__(module.name)
assert state() == before, "an import has changed vLLM"

from paged_kv.vllm.frontend import plugin
plugin.register()
once = state()
assert once != before
plugin.register()
assert state() == once, "register() is not idempotent"
assert once[1:5] == before[1:5], "without a policy only EngineArgs is wrapped"
"""

CONFIG = """
import dataclasses, json, sys
from vllm import EngineArgs
from vllm.v1.engine.async_llm import load_stat_logger_plugin_factories
config = EngineArgs(sys.argv[1], skip_tokenizer_init=True).create_engine_config()
print(json.dumps({
    "worker_cls": config.parallel_config.worker_cls,
    "scheduler_cls": config.scheduler_config.scheduler_cls,
    "block_size": config.cache_config.block_size,
    "additional_config": config.additional_config,
    "hash": config.compute_hash(),
    "loggers": [repr(factory) for factory in load_stat_logger_plugin_factories()],
    "wrapped": hasattr(EngineArgs, "_paged_kv_wrapped") or hasattr(EngineArgs, "plugins"),
}))
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    line = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.vllm
def test_nothing_happens_without_being_asked(tmp_path):
    """Imports change nothing, registering twice is once, without a policy all is as vLLM has it.

    In one process without the plugin, since vLLM takes 10 s to import, and one with it.
    """
    model = tiny_models.config_only("llama", tmp_path)
    without, with_plugin = (
        json.loads(run(script, model, VLLM_PLUGINS=names).splitlines()[-1])
        for script, names in ((CONFIG + UNTOUCHED, ""), (CONFIG, "paged_kv"))
    )
    assert (without.pop("wrapped"), with_plugin.pop("wrapped")) == (False, True)
    assert with_plugin == without
