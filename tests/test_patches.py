"""The source patches: each applies to the installed vLLM, and paged_kv then uses its hook.

They are applied together to one copy, made of links: a start of vLLM takes 10 s.
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

PATCHES = sorted((Path(__file__).parent.parent / "patches" / "vllm-0.32.0").glob("*.patch"))
FLAGS = ["--kv-policy", "streaming", "--kv-budget", "96", "--num-gpu-blocks-override", "20"]
FLAGS += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(64 << 20)]
PROMPT = [token % 250 + 3 for token in range(0, 700, 7)]

# argv: the model and our flags. Prints what was wrapped, what hooks were used, and the tokens.
GENERATE = """
import json, sys
import engines
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(["--model", *sys.argv[2:]])
llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
scheduler = engines.scheduler(llm)
prompt = json.loads(sys.argv[1])
tokens = engines.generate(llm, [prompt], 100)
try:
    engines.generate(llm, [prompt * 7], 4)
except VLLMValidationError as error:
    refusal = str(error)
clipped = scheduler._clip_chunk if hasattr(Scheduler, "_clip_chunk") else None
print(json.dumps({
    "tokens": tokens,
    "refusal": refusal,
    "events": engines.worker(llm).compactor.num_events,
    "options wrapped": hasattr(EngineArgs, "_paged_kv_wrapped"),
    "options hook": [plugin.__name__ for plugin in getattr(EngineArgs, "plugins", [])],
    "chunks wrapped": scheduler.need_mamba_block_aligned_split,
    "chunks hook": getattr(clipped, "__module__", None),
    "intake wrapped": hasattr(InputProcessor, "_paged_kv_wrapped"),
    "intake hook": [check.__module__ for check in getattr(InputProcessor, "validators", [])],
}))
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


def generate(model: str, *path: Path) -> dict[str, Any]:
    """What GENERATE prints, with these folders before the installed packages."""
    places = [*map(str, path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    line = [sys.executable, "-c", GENERATE, json.dumps(PROMPT), model, *FLAGS]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_says_why_and_until_when(patch):
    header = patch.read_text().partition("\n---\n")[0]
    for word in ("Why ", "How ", "Offers upstream: ", "Until "):
        assert f"\n{word}" in header
    assert patch.name in (patch.parent.parent / "README.md").read_text()


@pytest.mark.vllm
def test_a_patched_vllm_is_not_wrapped(tmp_path, patched):
    model = tiny_models.saved("llama", tmp_path)
    result = generate(model, patched)
    settings = {"skip_tokenizer_init": True, "max_model_len": 1024, "num_gpu_blocks_override": 20}
    with engines.engine(model, {"policy": "streaming", "budget": 96}, **settings) as llm:
        expected = engines.generate(llm, [PROMPT], 100)
        assert engines.scheduler(llm).need_mamba_block_aligned_split, "nothing to compare with"

    assert result.pop("events") > 0
    assert result.pop("refusal").startswith("the prompt has 700 tokens, but the KV cache holds")
    assert result == {
        "tokens": expected,
        "options wrapped": False,
        "options hook": ["paged_kv.vllm.options"],
        "chunks wrapped": False,
        "chunks hook": "paged_kv.vllm.scheduler",
        "intake wrapped": False,
        "intake hook": ["paged_kv.vllm.intake"],
    }
