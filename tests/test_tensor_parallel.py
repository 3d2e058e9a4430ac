"""Two ranks on one CPU machine give the tokens of one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
import tiny_models
from policy_cases import CALIBRATED

# Streaming is in the pyramid, snapkv below spill and in the swap.
POLICIES: dict[str, dict[str, Any]] = {
    "pyramidal": {"policy": "pyramidal+streaming", "budget": 128, "pyramid_beta": 1.5},
    "random": {"policy": "random", "budget": 96},  # a rank must know which heads it has
    "h2o": {"policy": "h2o", "budget": 96},
    "value_merge": {"policy": "value_merge", "of": "knorm", "budget": 96},
    "calibrated": {"policy": "calibrated_attention", "budget": 96, **CALIBRATED},
    "gathered": {"policy": "calibrated_attention", "budget": 96},  # by each rank for its heads
    "int4 pages": {"page_format": "int4", "residual_pages": 1},
    "spill": {"policy": "snapkv", "budget": 96, "observation_window": 8, "spill": True},
    "pressure": {"policy": "h2o", "budget": 96, "start": "pressure"},
    "swap": {"policy": "snapkv", "budget": "0.9", "observation_window": 8, "swap_space": 0.05},
}
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
}
MAX_TOKENS = 56
# Pages: not for both prompts and what follows them.
SMALL_POOL = {"num_gpu_blocks_override": 16, "max_model_len": 448}


def settings_of(policy: str) -> dict[str, Any]:
    return SETTINGS | (SMALL_POOL if policy in ("swap", "pressure") else {})


# Multi-process, one core for each rank. vLLM spawns ranks, each of which imports vLLM for 10 s:
# here they come from a server that has imported them once.
TWO_RANKS = """
import json, multiprocessing, sys
import engines
from vllm.v1.executor import multiproc_executor

from paged_kv.vllm.watch import places, totals

def counted_by_ranks(paged_kv):
    # Compactions and their nanoseconds, as each rank has counted them.
    if "policy" not in paged_kv:
        return {}
    found = {path.name: totals.read(path) for path in places.files(places.directory(), 0)}
    return {name: file.values[:2].tolist() for name, file in found.items() if "rank" in name}

if __name__ == "__main__":  # the ranks import this file
    multiprocessing.set_forkserver_preload(["engines", "vllm.v1.worker.cpu_worker"])
    context = multiprocessing.get_context("forkserver")
    multiproc_executor.get_mp_context = lambda: context
    for model, paged_kv, settings, prompts, max_tokens in json.load(open(sys.argv[1])):
        with engines.engine(model, paged_kv, tensor_parallel_size=2, **settings) as llm:
            print(json.dumps(engines.generate(llm, prompts, max_tokens)), flush=True)
            print(json.dumps(counted_by_ranks(paged_kv)), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_models.saved("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(n)] for n in (300, 84)]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, model, prompts) -> dict[str, Any]:
    """Tokens by policy."""
    path = tmp_path_factory.mktemp("two_ranks")
    cases = [
        [model, paged_kv, settings_of(name), prompts, MAX_TOKENS]
        for name, paged_kv in POLICIES.items()
    ]
    (path / "cases.json").write_text(json.dumps(cases))
    (path / "two_ranks.py").write_text(TWO_RANKS)
    places = [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    line = [sys.executable, str(path / "two_ranks.py"), str(path / "cases.json")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tokens = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    counted = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(POLICIES, zip(tokens, counted, strict=True), strict=True))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_give_the_tokens_of_one(model, prompts, of_two_ranks, policy):
    with engines.engine(model, POLICIES[policy], **settings_of(policy)) as llm:
        tokens = engines.generate(llm, prompts, MAX_TOKENS)
        if policy == "swap":
            counts = engines.scheduler(llm).connector.ledger.counts
            assert counts["swapped_in_requests"] == counts["swapped_out_requests"] > 0
        compactor = engines.worker(llm).compactor
        assert compactor is None or compactor.num_events > 0
    assert len(set(tokens[0])) > 20, "the model repeats itself: a difference would not show"
    # Sums in another order put some numbers of quantized pages into the neighbouring code, which
    # a random model makes much of after a while.
    same = 16 if "page_format" in POLICIES[policy] else MAX_TOKENS
    tokens_of_two, counted = of_two_ranks[policy]
    assert [found[:same] for found in tokens] == [found[:same] for found in tokens_of_two]
    for rank in range(2 if compactor else 0):
        number, nanoseconds = counted[f"engine-0-rank-{rank}"]
        assert number == compactor.num_events
        assert nanoseconds > 0
