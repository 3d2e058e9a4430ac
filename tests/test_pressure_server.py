"""A swinging load on `vllm serve`: only the bursts' requests shrink, and memory stays as it is."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import psutil
import pytest
import servers
import tiny_models

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PAGES = 40
SHRANK = re.compile(r"under pressure: (\d+) requests shrank")
MEMORY = 24 << 20  # bytes by which processes may differ


def body(*firsts: int) -> dict[str, Any]:
    prompts = [[3 + (first + 7 * place) % 250 for place in range(100)] for first in firsts]
    return {
        "model": "tiny",
        "prompt": prompts,
        "max_tokens": 200,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }


def shrunk(server: servers.Server) -> int:
    return sum(map(int, SHRANK.findall(server.log.read_text())))


def memory(server: servers.Server) -> int:
    return sum(psutil.Process(one).memory_info().rss for one in server.processes())


def ask(server: servers.Server, first: int) -> list[int]:
    status, answer = server.post("/v1/completions", body(first))
    assert status == 200, answer
    tokens: list[int] = answer["choices"][0]["token_ids"]
    assert len(tokens) == 200
    return tokens


def metric(server: servers.Server, name: str) -> float:
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in lines)


def test_burst_calm_burst(tmp_path):
    model = tiny_models.saved("llama", tmp_path / "model", tokenizer=True)
    line = [servers.VLLM, "serve", model, "--enforce-eager", "--served-model-name", "tiny"]
    line += ["--max-model-len", "512", "--num-gpu-blocks-override", str(PAGES)]
    line += ["--kv-policy", "streaming", "--kv-budget", "96", "--kv-start", "pressure"]
    variables = servers.environment(tmp_path)
    variables |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "0.1"}
    server = servers.Server(line, variables, tmp_path / "log")
    try:
        server.wait_until_ready()
        calm = [ask(server, first) for first in range(3)]
        assert shrunk(server) == 0
        counts, used = [0], []
        for _ in range(4):
            # One call: of ten, some could be over before others are there.
            status, answer = server.post("/v1/completions", body(*range(10)))
            assert (status, len(answer["choices"])) == (200, 10)
            assert [ask(server, first) for first in range(3)] == calm, "a calm request has lost"
            counts.append(shrunk(server))
            used.append(memory(server))
        assert all(after > before for before, after in pairwise(counts))
        assert counts[-1] <= 4 * 10
        assert max(used) - used[0] < MEMORY, used
        assert metric(server, "vllm:num_preemptions_total") == 0
        assert metric(server, "vllm:kv_cache_usage_perc") == 0
        log = server.log.read_text()
        *_, block = log.partition("Application startup complete.")[0].rpartition("] paged_kv\n")
        lines = [line.partition("] ")[2].split() for line in block.splitlines()]
        assert [words[0] for words in lines if words] == [
            *("policy", "keeps", "capacity", "bounded", "prompts", "metrics", "page", "guide")
        ]
        assert metric(server, "vllm:paged_kv_shrunk_requests_total") == counts[-1]
        assert metric(server, "vllm:paged_kv_avoided_preemptions_total") > 0
    finally:
        server.kill()
