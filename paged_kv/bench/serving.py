"""What throughput and latency do: servers of all cases take turns, then a row for each case.

Every load has its servers, for the pool is the server's. They all stay up, and each round runs
every case once (A B A B), so that a ratio compares neighbours in time. Where memory is too short
for that, a server is started for each turn. What an earlier run has finished is left out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from paged_kv import results
from paged_kv.bench import arguments, client, resume
from paged_kv.bench.cases import PEERS, Case, Load
from paged_kv.bench.client import MODEL_NAME
from paged_kv.bench.rows import write
from paged_kv.bench.series import Score, Series, Turns, fields_of, make_rows
from paged_kv.bench.server import Refused, Server
from paged_kv.config import DEFAULT_PAGE_SIZE

SPARE = 1.25  # of the first server's memory, for each further one


def main(args: argparse.Namespace, score: Score) -> None:
    """Runs, writes, prints. Raises ValueError for mistakes and for what vLLM refuses."""
    cases, loads = arguments.read(args)
    turns = [*product(args.request_rate, cases)]
    records = [find(args, score, load, turns) for load in loads]
    resume.tell(args.out, sum(len(each.rows) for each in records), len(loads) * len(turns))
    rounds = len(args.request_rate) * args.rounds
    done = sum(rounds if each.rows else len(each.rounds) for each in records) * len(cases)
    total = rounds * len(loads) * len(cases)
    shown: list[results.Row] = []
    try:
        with (
            ended_by_sigterm(),
            tqdm(total=total, initial=done, unit="run", file=sys.stderr) as bar,
        ):
            for load, record in zip(loads, records, strict=True):
                rows = record.rows
                if not rows:
                    series = measure(args, cases, load, record, bar)
                    rows = [*make_rows(args, score, load, series)]
                bar.clear()
                for row in rows:
                    shown.append(row)
                    write(args, row, is_new=not record.rows)
                record.close()
    finally:  # what is done is done
        if shown and not args.json:
            results.print_table(shown, ("policy", "budget", "page_format", *score.columns))


def find(
    args: argparse.Namespace, score: Score, load: Load, turns: Sequence[tuple[float, Case]]
) -> resume.Record:
    """What an earlier run of this command has left of a load."""
    fields = [fields_of(args, load, rate, case) for rate, case in turns]
    return resume.Record(args.out, resume.asked(args, score.task, fields))


def measure(
    args: argparse.Namespace, cases: Sequence[Case], load: Load, record: resume.Record, bar: Any
) -> Turns:
    """All rounds of one load, but for those that are there."""
    with ExitStack() as stack:
        servers = start(args.model, cases, load, args.seed, stack)
        turns = {each: Series() for each in product(args.request_rate, cases)}
        cpu_before = {case: server.cpu_seconds() for case, server in servers.items()}
        cpu_busy, busy = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
        # A seed of its own for each: prompts that a server has seen are in its prefix cache.
        rates = args.request_rate * args.rounds
        for seed, rate in [*enumerate(rates, args.seed)][len(record.rounds) :]:
            latest = []
            for case in cases:
                bar.set_description(case.label)
                with turn(servers, args.model, case, load, args.seed) as server:
                    cpu, begin = server.cpu_seconds(), time.perf_counter()
                    served = client.run(server, args.model, load, rate, seed)
                    cpu_busy[case] += server.cpu_seconds() - cpu
                    busy[case] += time.perf_counter() - begin
                latest.append(served)
                bar.update()
            record.add(latest)
        for rate, finished in zip(rates, record.rounds, strict=True):
            for case, served in zip(cases, finished, strict=True):
                turns[rate, case].served.append(served)
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
        "dtype": load.dtype,
        "block-size": DEFAULT_PAGE_SIZE,
        "max-model-len": load.max_model_len,
        "max-num-seqs": load.requests,
        "kv-cache-memory-bytes": load.pool_bytes(model),
        "gpu-memory-utilization": 0.1,  # of no account beside the bytes, but vLLM wants it free
        "seed": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # On a GPU CUDA graphs are half of the speed; on CPUs compiling costs minutes and gains little.
    eager = [] if free_device_memory() else ["--enforce-eager"]
    return [str(model), *flags, *eager, *case.flags()]


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
