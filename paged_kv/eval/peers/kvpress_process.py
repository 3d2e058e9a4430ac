"""The process that runs kvpress: see paged_kv/hf/driver/kvpress_child.py."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from paged_kv import hf
from paged_kv.eval.prompt import Prompt

VERSION = "0.5.5"
VARIABLE = "PAGED_KV_KVPRESS_PYTHON"
MADE = Path(".venv/peers/kvpress/bin/python")  # below the source tree, by `make peers`
ROOT = Path(__file__).parents[3]
CHILD = Path(hf.__file__).parent / "driver" / "kvpress_child.py"
HOW = (
    "make one with `make peers` in the source tree, or anywhere with `python -m venv DIR` and "
    f"`DIR/bin/pip install torch==2.13.0 kvpress=={VERSION}`, then name DIR/bin/python by "
    f"--kvpress-python or {VARIABLE}"
)
# name -> class. All keep the same number of entries in every head, pyramidkv not in every layer.
PRESSES = {
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
    "knorm": "KnormPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
    "streaming_llm": "StreamingLLMPress",
    "observed_attention": "ObservedAttentionPress",
    "pyramidkv": "PyramidKVPress",
    "lagkv": "LagKVPress",
    "cur": "CURPress",
}


def interpreter(given: str | None) -> Path:
    """The one that was given, else that of the variable, else that of `make peers`."""
    return Path(given or os.environ.get(VARIABLE) or ROOT / MADE)


@cache
def check(python: Path) -> dict[str, str]:
    """The versions of what the interpreter has.

    Raises:
        ValueError: it cannot be started, or its kvpress is missing or another one.
    """
    with _child(python, "", "") as child:
        return child.versions


def answers(
    python: Path,
    model_dir: Path,
    press: str,
    prompts: Iterable[Prompt],
    kept: Callable[[int], int] | None,
) -> Iterator[dict[str, Any]]:
    """The fields of one Answer for each prompt; see peers.answers."""
    with _child(python, str(model_dir), PRESSES[press]) as child:
        for prompt in prompts:
            # Before targets the last token is read after the compression; see peer_protocol.
            length = len(prompt.context) - bool(prompt.targets and not prompt.question)
            yield child.ask([prompt._asdict(), kept and kept(length)])


@contextmanager
def _child(python: Path, model_dir: str, press: str) -> Iterator[_Child]:
    with tempfile.TemporaryFile("w+") as log:
        child = _Child(python, [model_dir, press], log)
        try:
            yield child
        finally:
            child.close()


class _Child:
    """A running kvpress_child.py.

    Args:
        python: the interpreter.
        arguments: the child's, without the number of threads.
        log: an open file for what it prints.
    """

    def __init__(self, python: Path, arguments: list[str], log: Any) -> None:
        import torch

        self.log = log
        # -I: neither our PYTHONPATH nor this folder may decide what is imported there.
        command = [str(python), "-I", str(CHILD), *arguments, str(torch.get_num_threads())]
        environment = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        try:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        except OSError as error:
            reason = f"kvpress-python {python} cannot be started ({error.strerror})"
            raise ValueError(f"{reason}: {HOW}") from None
        self.versions = self._read_versions(python)

    def _read_versions(self, python: Path) -> dict[str, str]:
        try:
            versions: dict[str, str] = self._reply()
        except RuntimeError:
            self.close()
            raise
        found = versions["kvpress"]
        if found != VERSION:
            self.close()
            what = f"has kvpress {found}" if found else "has no kvpress"
            raise ValueError(f"kvpress-python {python} {what}; {VERSION} is needed: {HOW}")
        return versions

    def ask(self, message: Any) -> Any:
        """The child's reply. Raises RuntimeError if there is none."""
        try:
            self.process.stdin.write(json.dumps(message, default=list) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it is dead: _reply says so
        return self._reply()

    def _reply(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if line.endswith("\n"):
            return json.loads(line)
        status = self.process.wait()
        self.log.seek(0)
        tail = "".join(self.log.readlines()[-30:])
        raise RuntimeError(f"kvpress's process died (exit status {status}); it printed:\n{tail}")

    def close(self) -> None:
        """Ends the child."""
        self.process.kill()
        self.process.communicate()
