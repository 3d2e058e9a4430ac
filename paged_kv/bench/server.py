"""`vllm serve` in processes of its own, on a free port of this machine.

A server that waits does next to nothing (see idle_cpu in benchmarks/README.md), so several can take
turns on the same cores. They end with us, whatever happens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import psutil
from typing_extensions import Self

from paged_kv.vllm.driver.engine import POOL_VARIABLE, engine_environment

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
START_SECONDS = 1800.0  # a large model is read, and compiled for a GPU
STOP_SECONDS = 20.0
_REASON = re.compile(r"(?:^|\s)(?:\w+\.)*(\w*Error|vllm: error): (?P<reason>\S.*)$")
_NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")


class Refused(RuntimeError):
    """A server that ended before it was ready; `reason` is the first error that it printed."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def environment() -> dict[str, str]:
    """Of servers and clients: as users run them, with threads that do not spin for long."""
    defaults = engine_environment()
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"):  # vLLM decides on these
        del defaults[name]
    others = "VLLM_ENABLE_V1_MULTIPROCESSING", POOL_VARIABLE
    return {k: v for k, v in os.environ.items() if k not in others} | defaults


class Server:
    """A server; a context manager. It starts while we go on.

    Args:
        name: in error messages.
        flags: of `vllm serve`, the model first.
    """

    def __init__(self, name: str, flags: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        line = [*VLLM, "serve", *flags, "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            line,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Raises Refused if it ends, RuntimeError if it takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                text = self._printed()
                reason = first_reason(text) or f"exit status {self.process.returncode}"
                raise Refused(self._died(text), reason)
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.25)
        raise RuntimeError(
            f"the server of {self.name} was not ready after {START_SECONDS:.0f} s; it printed:\n"
            f"{_tail(self._printed())}"
        )

    def check(self) -> None:
        """Raises RuntimeError, with the end of what it printed, if it has died."""
        if self.process.poll() is not None:
            raise RuntimeError(self._died(self._printed()))

    def get(self, path: str) -> str:
        """What a GET answers. Raises OSError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def post(self, path: str, body: dict[str, Any]) -> str:
        """What a POST of JSON answers. Raises RuntimeError: it has died, or refuses."""
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
                text: str = answer.read().decode()
        except OSError as error:
            self.check()
            raise RuntimeError(f"the server of {self.name} answers {path}: {error}") from None
        return text

    def metrics(self) -> dict[str, float]:
        """Prometheus' samples by name, summed over labels. Raises RuntimeError if it has died."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            text = self.get("/metrics")
        except OSError as error:
            self.check()
            raise RuntimeError(f"the server of {self.name} gives no metrics: {error}") from None
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        return sum(sum(each.cpu_times()[:2]) for each in self._processes())

    def memory_bytes(self) -> int:
        """Resident memory of all its processes, what they share counted once for each."""
        return sum(each.memory_info().rss for each in self._processes())

    def close(self) -> None:
        """Ends all its processes."""
        session = self._processes()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            except BaseException:
                self._kill(session)
                raise
        self._kill(session)
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

    def _kill(self, session: list[psutil.Process]) -> None:
        """What outlives the front end: its process group, and what it had started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for each in session:
            if each.is_running():  # the same process, not another one with its number
                each.kill()
        psutil.wait_procs(session, timeout=STOP_SECONDS)
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        """All that run in its session."""
        found = []
        for each in psutil.process_iter():
            try:
                if os.getsid(each.pid) == self.process.pid and each.status() != "zombie":
                    found.append(each)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def _died(self, printed: str) -> str:
        status, reason = self.process.returncode, first_reason(printed)
        why = f", {reason}" if reason else ""
        return f"the server of {self.name} died ({status}{why}); it printed:\n{_tail(printed)}"

    def _printed(self) -> str:
        self.log.seek(0)
        return self.log.read()


def first_reason(text: str) -> str | None:
    """The first error that a log names: those after it follow from it."""
    for line in text.splitlines():
        if match := _REASON.search(line):
            return match["reason"].strip()
    return None


def _tail(text: str) -> str:
    """The end of a log, without what libraries say when they are unloaded."""
    return "\n".join([line for line in text.splitlines() if not _NOISE.match(line)][-30:])
