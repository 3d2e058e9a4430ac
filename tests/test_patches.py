"""The source patches: each applies to the installed vLLM, and paged_kv then uses its hook.

They are applied together to one copy, made of links: a start of vLLM takes 10 s. What needs no
engine (options, the scheduler in a world of integers) is tested with every vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engines
import pytest
import tiny_models

PATCHES = sorted((Path(__file__).parent.parent / "patches" / "vllm").glob("*.patch"))
FLAGS = ["--kv-policy", "streaming", "--kv-budget", "96", "--num-gpu-blocks-override", "20"]
FLAGS += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(64 << 20)]
PROMPT = [token % 250 + 3 for token in range(0, 700, 7)]

# What was wrapped, and what hooks were used.
HOOKS = """
import json, sys
import engines
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor

def engine_args():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", *sys.argv[2:]]))

def hooks(scheduler):
    clipped = scheduler._clip_chunk if hasattr(Scheduler, "_clip_chunk") else None
    return {
        "options wrapped": hasattr(EngineArgs, "_paged_kv_wrapped"),
        "options hook": [plugin.__name__ for plugin in getattr(EngineArgs, "plugins", [])],
        "chunks wrapped": scheduler.need_mamba_block_aligned_split,
        "chunks hook": getattr(clipped, "__module__", None),
        "intake wrapped": hasattr(InputProcessor, "_paged_kv_wrapped"),
        "intake hook": [check.__module__ for check in getattr(InputProcessor, "validators", [])],
    }
"""
HOOKED = {
    "options wrapped": False,
    "options hook": ["paged_kv.vllm.frontend.options"],
    "chunks wrapped": False,
    "chunks hook": "paged_kv.vllm.scheduler.chunks",
    "intake wrapped": False,
    "intake hook": ["paged_kv.vllm.frontend.intake"],
}

# argv: a prompt, the model and our flags. Prints the tokens, too.
GENERATE = f"""
{HOOKS}
llm = LLM.from_engine_args(engine_args())
prompt = json.loads(sys.argv[1])
tokens = engines.generate(llm, [prompt], 100)
try:
    engines.generate(llm, [prompt * 7], 4)
except VLLMValidationError as error:
    refusal = str(error)
print(json.dumps(hooks(engines.scheduler(llm)) | {{
    "tokens": tokens,
    "refusal": refusal,
    "events": engines.worker(llm).compactor.num_events,
}}))
"""

# argv: a seed, the model and our flags. Prints the steps of a random world, too.
WORLD = f"""
{HOOKS}
from random_worlds import random_world
engine_args().create_engine_config()
world = random_world(int(sys.argv[1]))
print(json.dumps(hooks(world.scheduler) | {{"chunks": world.chunks}}))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A folder with a copy of vLLM that has the patches."""
    installed = Path(next(iter(find_spec("vllm").submodule_search_locations)))
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(installed, folder / "vllm", copy_function=os.symlink)
    for patch in PATCHES:
        for line in patch.read_text().splitlines():
            if line.startswith("+++ b/"):
                file = folder / line.removeprefix("+++ b/")
                content = file.read_bytes()
                file.unlink()
                file.write_bytes(content)
        subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
    return folder


def run(script: str, first: Any, model: str, *path: Path) -> dict[str, Any]:
    """What a script prints, with these folders before the installed packages."""
    places = [
        *map(str, path),
        str(Path(__file__).parent / "support"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    line = [sys.executable, "-c", script, json.dumps(first), model, *FLAGS]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_says_why_and_until_when(patch):
    header = patch.read_text().partition("\n---\n")[0]
    for word in ("Why ", "How ", "Offers upstream: ", "Until "):
        assert f"\n{word}" in header
    assert patch.name in (patch.parent.parent / "README.md").read_text()


def test_a_patched_scheduler_does_what_a_borrowed_hook_does(tmp_path, patched):
    from random_worlds import random_world

    result = run(WORLD, 5, tiny_models.saved("llama", tmp_path), patched)
    unpatched = random_world(5)
    assert unpatched.scheduler.need_mamba_block_aligned_split, "nothing to compare with"
    assert result.pop("chunks") == json.loads(json.dumps(unpatched.chunks)) != {}
    assert result == HOOKED


@pytest.mark.vllm
def test_a_patched_vllm_is_not_wrapped(tmp_path, patched):
    model = tiny_models.saved("llama", tmp_path)
    result = run(GENERATE, PROMPT, model, patched)
    settings = {"skip_tokenizer_init": True, "max_model_len": 1024, "num_gpu_blocks_override": 20}
    with engines.engine(model, {"policy": "streaming", "budget": 96}, **settings) as llm:
        expected = engines.generate(llm, [PROMPT], 100)
        assert engines.scheduler(llm).need_mamba_block_aligned_split, "nothing to compare with"

    assert result.pop("events") > 0
    assert result.pop("refusal").startswith("the prompt has 700 tokens, but the KV cache holds")
    assert result.pop("tokens") == expected
    assert result == HOOKED
