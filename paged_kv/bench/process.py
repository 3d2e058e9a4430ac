"""Engines in processes of their own, so that several can take turns on the same cores.

An engine that has nothing to do waits for a message and its OpenMP threads sleep: it takes no time
from the others (benchmarks report idle_cpu, the share of a core that waiting engines did use).

    parent                               child: python -m paged_kv.bench.process FD
    EngineProcess(settings)   -------->  Engine(settings)
    ready()                   <--------  ("done", EngineInfo)
    run(workload, progress)   -------->  Engine.run(workload)
                              <--------  ("progress", output tokens) ... ("done", RunResult)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from typing_extensions import Self

from paged_kv.vllm.driver.engine import Engine, engine_environment
from paged_kv.vllm.driver.memory import measure
from paged_kv.vllm.driver.workload import (
    EngineInfo,
    EngineSettings,
    MemoryReport,
    RunResult,
    Tokens,
    Workload,
)

PROGRESS_SECONDS = 0.25


class EngineProcess:
    """An engine in a child process; a context manager. It starts while the parent goes on.

    All methods raise RuntimeError if the child died, with the end of what it printed, and
    ValueError for what vLLM refused.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self.pipe, child = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paged_kv.bench.process", str(child.fileno())],
            env={**os.environ, **engine_environment()},
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        child.close()
        self.pipe.send(settings)

    def ready(self) -> EngineInfo:
        """Waits for the engine's start; once, before anything else."""
        info: EngineInfo = self._answer()
        return info

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Engine.encode."""
        tokens: list[Tokens] = self._ask(("encode", list(texts)))
        return tokens

    def run(
        self, workload: Workload, progress: Callable[[int], None] = lambda tokens: None
    ) -> RunResult:
        """Runs a workload; progress gets the output tokens so far, a few times per second."""
        result: RunResult = self._ask(("run", workload), progress)
        return result

    def memory(self, *workloads: Workload) -> MemoryReport:
        """What the engine holds: memory.measure with a workload and a single request."""
        report: MemoryReport = self._ask(("memory", workloads))
        return report

    def cpu_seconds(self) -> float:
        """Processor time that the child has used so far."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, system = file.read().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the child."""
        self.pipe.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: Any, progress: Callable[[int], None] = lambda tokens: None) -> Any:
        self.pipe.send(message)
        return self._answer(progress)

    def _answer(self, progress: Callable[[int], None] = lambda tokens: None) -> Any:
        try:
            while True:
                kind, content = self.pipe.recv()
                if kind == "done":
                    return content
                if kind == "error":
                    raise ValueError(content)
                progress(content)
        except (EOFError, ConnectionError):
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-30:])
            raise RuntimeError(f"the engine's process died; it printed:\n{tail}") from None


def _serve(pipe: Connection) -> None:
    """The child: starts an engine, then does what it is asked to until the parent goes."""
    engine = Engine(pipe.recv())
    pipe.send(("done", engine.info()))
    while True:
        command, argument = pipe.recv()
        if command == "encode":
            pipe.send(("done", engine.encode(argument)))
            continue
        if command == "memory":
            pipe.send(("done", measure(engine, *argument)))
            continue
        reported = time.perf_counter()
        for content in engine.run(argument):
            if not isinstance(content, int):
                pipe.send(("done", content))
            elif time.perf_counter() - reported >= PROGRESS_SECONDS:
                pipe.send(("progress", content))
                reported = time.perf_counter()


def _main() -> None:
    pipe = Connection(int(sys.argv[1]))
    try:
        _serve(pipe)
    except (EOFError, ConnectionError):
        pass  # the parent has what it wanted
    except ValueError as error:
        pipe.send(("error", " ".join(str(error).split())))
        raise


if __name__ == "__main__":
    _main()
