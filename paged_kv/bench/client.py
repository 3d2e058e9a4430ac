"""vLLM's benchmark client (`vllm bench serve`) against a server, and what both say of a run."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from paged_kv.bench.cases import Load
from paged_kv.bench.server import VLLM, Server, environment
from paged_kv.bench.settings import random_prompts

POLL_SECONDS = 0.5  # between looks at the server's metrics
MODEL_NAME = "model"  # as the server is told to call it
RUNNING = "vllm:num_requests_running"
PREEMPTIONS = "vllm:num_preemptions_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"


@dataclass(frozen=True)
class Served:
    """One run: `requests` of a load, at a rate.

    Args:
        seconds: by the client's clock.
        tokens_per_second: of output.
        times: milliseconds, "ttft_ms" (median), "ttft_mean_ms", "ttft_p99_ms", the same of "itl";
            "tpot_ms" (median).
        running: most sequences that the server said it was running, of those looks.
        preemptions: by the server's counter.
        prompt_tokens: of all requests, as the server counted them.
    """

    seconds: float
    tokens_per_second: float
    times: dict[str, float]
    running: int
    preemptions: int
    prompt_tokens: int


def run(server: Server, model: Path, load: Load, rate: float, seed: int) -> Served:
    """Sends the load's requests, and waits for them all.

    Args:
        server: ready, with MODEL_NAME.
        model: its directory, for the tokenizer.
        load: has the sizes.
        rate: requests per second, a Poisson process; inf: all at once.
        seed: of the prompts, and of when they arrive.

    Raises:
        RuntimeError: the server died, or the client did, or a request failed.
    """
    before = server.metrics()
    running = 0.0
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as log:
        client = subprocess.Popen(
            _line(server, model, load, rate, seed, directory),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while client.poll() is None:
                running = max(running, server.metrics()[RUNNING])
                with suppress(subprocess.TimeoutExpired):
                    client.wait(POLL_SECONDS)
        finally:
            client.kill()
            client.wait()
        server.check()
        result = _saved(Path(directory, "result.json"), client.returncode, log)
    after = server.metrics()
    counted = {name: after[name] - before[name] for name in (PREEMPTIONS, PROMPT_TOKENS)}
    return read_result(result, load, server.name, running, counted)


def _saved(file: Path, status: int, log: IO[str]) -> dict[str, Any]:
    """The client's JSON. Raises RuntimeError, with the end of its log, if it failed."""
    if status or not file.exists():
        log.seek(0)
        tail = "\n".join(log.read().splitlines()[-30:])
        raise RuntimeError(f"vLLM's client failed ({status}); it printed:\n{tail}")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def read_result(
    result: dict[str, Any], load: Load, name: str, running: float, counted: dict[str, float]
) -> Served:
    """What the client's JSON says, with the server's counts. Raises RuntimeError.

    Args:
        result: as --save-result writes it.
        load: what was asked for.
        name: of the server.
        running: most sequences at once.
        counted: growth of PREEMPTIONS and PROMPT_TOKENS.
    """
    expected = load.requests * load.output_len
    if result["completed"] != load.requests or result["total_output_tokens"] != expected:
        raise RuntimeError(
            f"{name}: {result['completed']} of {load.requests} requests were answered, with "
            f"{result['total_output_tokens']} of {expected} tokens"
        )
    times = {}
    for what in ("ttft", "itl"):
        for prefix, suffix in (("median", ""), ("mean", "_mean"), ("p99", "_p99")):
            times[f"{what}{suffix}_ms"] = float(result[f"{prefix}_{what}_ms"])
    times["tpot_ms"] = float(result["median_tpot_ms"])
    assert all(math.isfinite(value) for value in times.values()), times
    return Served(
        seconds=float(result["duration"]),
        tokens_per_second=float(result["output_throughput"]),
        times=times,
        running=int(running),
        preemptions=int(counted[PREEMPTIONS]),
        prompt_tokens=int(counted[PROMPT_TOKENS]),
    )


def warm_up(server: Server, model: Path, load: Load, seed: int) -> None:
    """A few prompts that nobody has again: the first steps are slow. Raises RuntimeError."""
    prompts = random_prompts(model, min(4, load.requests), load.input_len, seed)
    body = {"model": MODEL_NAME, "prompt": prompts, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", {**body, "max_tokens": min(8, load.output_len)})


def _line(
    server: Server, model: Path, load: Load, rate: float, seed: int, directory: str
) -> list[str]:
    options = {
        "backend": "openai",
        "host": "127.0.0.1",
        "port": server.port,
        "model": model,
        "served-model-name": MODEL_NAME,
        "dataset-name": "random",
        "random-input-len": load.input_len,
        "random-output-len": load.output_len,
        "random-range-ratio": 0,
        "num-prompts": load.requests,
        "request-rate": rate,
        "seed": seed,
        "temperature": 0,
        "percentile-metrics": "ttft,itl,tpot",
        "metric-percentiles": "99",
        "result-dir": directory,
        "result-filename": "result.json",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*VLLM, "bench", "serve", *flags, "--ignore-eos", "--save-result", "--disable-tqdm"]
