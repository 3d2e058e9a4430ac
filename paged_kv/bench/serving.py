"""What throughput and latency do: servers of all cases take turns, then a row for each case.

Every load has its servers, for the pool is the server's. They all stay up, and each round runs
every case once (A B A B), so that a ratio compares neighbours in time. Where memory is too short
for that, a server is started for each turn.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from tqdm import tqdm

from paged_kv import results
from paged_kv.bench import arguments, client
from paged_kv.bench.cases import PEERS, PLAIN, Case, Load
from paged_kv.bench.client import MODEL_NAME, Served
from paged_kv.bench.rows import case_fields, write
from paged_kv.bench.server import Refused, Server
from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import DEFAULT_PAGE_SIZE

TIMES = ("ttft_ms", "ttft_mean_ms", "ttft_p99_ms", "itl_ms", "itl_mean_ms", "itl_p99_ms", "tpot_ms")
SPARE = 1.25  # of the first server's memory, for each further one


@dataclass
class Series:
    """What one case did at one rate, in all rounds.

    Args:
        served: one per round.
        idle_cpu: share of a core that its server took while others ran; None: it was not there.
    """

    served: list[Served] = field(default_factory=list)
    idle_cpu: float | None = None

    def median(self, value: Callable[[Served], float]) -> float:
        """Over rounds."""
        return median(value(one) for one in self.served)

    def ratios(self, plain: Series, value: Callable[[Served], float]) -> list[float]:
        """A value over plain vLLM's, round by round; none if that is 0 (see itl_ms)."""
        pairs = [(value(a), value(b)) for a, b in zip(self.served, plain.served, strict=True)]
        return [one / other for one, other in pairs] if all(other for _, other in pairs) else []


@dataclass(frozen=True)
class Score:
    """What a command's rows are scored by.

    Args:
        task: the command's name.
        metric: the score's name.
        higher_is_better: which way it goes.
        value: the score of a run.
        columns: of the table, after those that name the case.
    """

    task: str
    metric: str
    higher_is_better: bool
    value: Callable[[Served], float]
    columns: tuple[str, ...]


Turns = dict[tuple[float, Case], Series]  # by request rate and case


def main(args: argparse.Namespace, score: Score) -> None:
    """Runs, writes, prints. Raises ValueError for mistakes and for what vLLM refuses."""
    cases, loads = arguments.read(args)
    shown: list[results.Row] = []
    runs = len(loads) * len(cases) * len(args.request_rate) * args.rounds
    try:
        with ended_by_sigterm(), tqdm(total=runs, unit="run", file=sys.stderr) as bar:
            for load in loads:
                turns = measure(args, cases, load, bar)
                bar.clear()
                for row in make_rows(args, score, load, turns):
                    shown.append(row)
                    write(args, row)
    finally:  # what is done is done
        if shown and not args.json:
            results.print_table(shown, ("policy", "budget", "page_format", *score.columns))


def measure(args: argparse.Namespace, cases: Sequence[Case], load: Load, bar: Any) -> Turns:
    """All rounds of one load."""
    with ExitStack() as stack:
        servers = start(args.model, cases, load, args.seed, stack)
        rates = args.request_rate
        turns = {(rate, case): Series() for rate in rates for case in cases}
        cpu_before = {case: server.cpu_seconds() for case, server in servers.items()}
        cpu_busy, busy = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
        # A seed of its own for each: prompts that a server has seen are in its prefix cache.
        for seed, (_, rate) in enumerate(product(range(args.rounds), rates), args.seed):
            for case in cases:
                bar.set_description(case.label)
                with turn(servers, args.model, case, load, args.seed) as server:
                    cpu, begin = server.cpu_seconds(), time.perf_counter()
                    served = client.run(server, args.model, load, rate, seed)
                    cpu_busy[case] += server.cpu_seconds() - cpu
                    busy[case] += time.perf_counter() - begin
                turns[rate, case].served.append(served)
                bar.update()
        for (_, case), series in turns.items():
            idle = sum(busy.values()) - busy[case]
            if case in servers and idle:
                used = servers[case].cpu_seconds() - cpu_before[case] - cpu_busy[case]
                series.idle_cpu = max(0.0, used) / idle
    return turns


def start(
    model: Path, cases: Sequence[Case], load: Load, seed: int, stack: ExitStack
) -> Mapping[Case, Server]:
    """A server of each case, if there is memory for all; none if not. They end with the stack."""
    servers: dict[Case, Server] = {}
    for case in cases:
        before = free_device_memory()
        servers[case] = stack.enter_context(ready_server(model, case, load))
        client.warm_up(servers[case], model, load, seed)
        free = psutil.virtual_memory().available, free_device_memory()
        taken = servers[case].memory_bytes(), before - free[1]
        if len(servers) == 1 and not has_room(free, taken, len(cases) - 1):
            print("memory is too short for all servers at once: each is started for its turns",
                file=sys.stderr)  # fmt: skip
            servers[case].close()
            return {}
    return servers


@contextmanager
def turn(
    servers: Mapping[Case, Server], model: Path, case: Case, load: Load, seed: int
) -> Iterator[Server]:
    """The case's server; one for this turn where none stays up."""
    if case in servers:
        servers[case].check()
        yield servers[case]
        return
    with ready_server(model, case, load) as server:
        client.warm_up(server, model, load, seed)
        yield server


@contextmanager
def ready_server(model: Path, case: Case, load: Load) -> Iterator[Server]:
    """A server for a load. Raises ValueError, which names the case, if vLLM refuses it."""
    with Server(case.label, server_flags(model, case, load)) as server:
        try:
            server.wait_until_ready()
        except Refused as error:
            print(error, file=sys.stderr)
            kind = "peer" if case.policy in PEERS else "policy"
            raise ValueError(f"{kind} {case.label}: vLLM refuses it: {error.reason}") from None
        yield server


def server_flags(model: Path, case: Case, load: Load) -> list[str]:
    """Of `vllm serve`: the same memory and page size for all."""
    options = {
        "served-model-name": MODEL_NAME,
        "dtype": "bfloat16",
        "block-size": DEFAULT_PAGE_SIZE,
        "max-model-len": load.max_model_len,
        "max-num-seqs": load.requests,
        "kv-cache-memory-bytes": load.pool_tokens * kv_bytes_per_token(model),
        "gpu-memory-utilization": 0.1,  # of no account beside the bytes, but vLLM wants it free
        "seed": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # On a GPU CUDA graphs are half of the speed; on CPUs compiling costs minutes and gains little.
    eager = [] if free_device_memory() else ["--enforce-eager"]
    return [str(model), *flags, *eager, *case.flags()]


def make_rows(
    args: argparse.Namespace, score: Score, load: Load, turns: Turns
) -> Iterator[results.Row]:
    """The result row of each case and rate, in the order of the turns."""
    value = score.value
    for (rate, case), series in turns.items():
        plain = next((s for (r, c), s in turns.items() if r == rate and c.policy == PLAIN), None)
        all_times = [served.times for served in series.served]
        ratios = [] if plain is None else series.ratios(plain, value)
        yield {
            "task": score.task,
            **case_fields(args, case, load),
            "engine": "vllm serve",
            "score": round(series.median(value), 3),
            "metric": score.metric,
            "higher_is_better": score.higher_is_better,
            "standard_error": results.standard_error([value(served) for served in series.served]),
            "samples": len(series.served),
            "seconds": round(sum(served.seconds for served in series.served), 2),
            **results.provenance(args.model),
            "request_rate": "inf" if math.isinf(rate) else rate,
            "tokens_per_second": round(series.median(lambda one: one.tokens_per_second), 2),
            **{name: round(median(times[name] for times in all_times), 2) for name in TIMES},
            "running": max(served.running for served in series.served),
            "preemptions": series.median(lambda one: one.preemptions),
            "prompt_tokens": series.median(lambda one: one.prompt_tokens),
            "ratio": round(median(ratios), 4) if ratios else None,
            "ratios": [round(ratio, 4) for ratio in ratios],
            "idle_cpu": None if series.idle_cpu is None else round(series.idle_cpu, 4),
        }


def free_device_memory() -> int:
    """Bytes, of the GPU; 0 if there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def has_room(free: Sequence[int], taken: Sequence[int], servers: int) -> bool:
    """Whether so many more servers fit that take as much as one did, with something to spare."""
    return all(
        left >= SPARE * each * servers for left, each in zip(free, taken, strict=True) if each > 0
    )


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the servers, too, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
