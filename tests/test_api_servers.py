"""Several API servers and engines: what none of them can run is a 400, and all go on."""

from __future__ import annotations

import pytest
import servers
import tiny_models

pytestmark = pytest.mark.vllm

PAGES = 34  # one is vLLM's own


@pytest.mark.parametrize(
    "processes",
    [
        ("--api-server-count", "2", "--data-parallel-size", "2"),
        pytest.param(("--api-server-count", "2"), marks=pytest.mark.exhaustive),
        pytest.param(("--data-parallel-size", "2"), marks=pytest.mark.exhaustive),
    ],
    ids=" ".join,
)
def test_a_prompt_longer_than_the_pool(processes, tmp_path):
    """Which API server answers is chance, so it is asked often: each knows its engine's pool."""
    model = tiny_models.saved("llama", tmp_path / "model", tokenizer=True)
    line = [servers.VLLM, "serve", model, "--enforce-eager", "--served-model-name", "tiny"]
    line += ["--max-model-len", "2048", "--num-gpu-blocks-override", str(PAGES), *processes]
    line += ["--kv-policy", "streaming", "--kv-budget", "256"]
    server = servers.Server(line, servers.environment(tmp_path), tmp_path / "log")
    try:
        server.wait_until_ready()
        for length in (1057, 1900) * 4:
            status, answer = server.post("/v1/completions", body(length))
            assert (status, "holds prompts of at most 1056 (33" in str(answer)) == (400, True)
        for _ in range(4):
            status, answer = server.post("/v1/completions", body(1056))
            assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        # Which of them has taken over what is chance, too; together they have all of it, once.
        for _ in range(4):
            text = server.get("/metrics")
            assert sum_of(text, "vllm:paged_kv_freed_pages_total") == 4 * (1056 - 256) // 32
            pages = (PAGES - 1) * text.count("vllm:paged_kv_pool_pages{")
            assert sum_of(text, "vllm:paged_kv_pool_pages") == pages
            assert sum_of(text, "vllm:paged_kv_compactions_total") > 0
    finally:
        server.kill()


def sum_of(text: str, name: str) -> float:
    """A metric's value, all engines added up; 0 without one."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.split()[-1]) for line in lines)


def body(length: int) -> dict[str, object]:
    return {"model": "tiny", "prompt": [5] * length, "max_tokens": 4, "ignore_eos": True}
