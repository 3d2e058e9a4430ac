"""`paged-kv top`, the whole command: against servers of a few lines, and in terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from metric_texts import group, line, ours, rank, serving, swap, vllm

from paged_kv import cli
from paged_kv.top.server import TIMEOUT, Server

TEXT = vllm(num_requests_running=3) + ours(pool_pages=10, free_pages=4) + group("0", 6, 4, 400)
TEXT += rank("0", 1, 1.0) + swap(1, 1)
ONCE = ("--once", "--interval", "0.1")


def growing(number: int) -> str:
    """The answer to request `number`."""
    return TEXT.replace("generation_tokens_total{", "unused{") + line(
        "generation_tokens_total", 100 * number, engine="0", model_name="tiny"
    )


def test_once(capsys):
    with serving(growing) as (url, asked):
        status = cli.main(["top", url, *ONCE, "--header", "Authorization: Bearer X:Y"])
    shown = capsys.readouterr().out
    assert status == 0
    assert [path for path, _ in asked] == ["/metrics"] * 2
    assert [headers["Authorization"] for _, headers in asked] == ["Bearer X:Y"] * 2
    lines = shown.splitlines()
    assert lines[0] == "paged-kv top  tiny  pyramidal"
    assert re.fullmatch(rf"{url}/metrics   rates of the last [0-9.]+ s", lines[1])
    pattern = r"^tokens +output ([0-9.]+)/s, total 100   prompts 0.0/s, total 0$"
    output = re.search(pattern, shown, re.MULTILINE)
    assert 0 < float(output[1]) <= 1000, "of 100 tokens in at least a tenth of a second"
    assert "6 of 10 pages held, 4 free (40.0%)\n" in shown
    assert "\x1b" not in shown
    assert all(line == line.rstrip() for line in lines)


def test_once_names_that_steer_terminals(capsys):
    name = "[red]x[/red]\x1b[31m\x9b2J\x1b]0;title\x07"
    with serving(lambda _: TEXT + vllm(model=name)) as (url, _):
        assert cli.main(["top", f"{url}/metrics/", *ONCE]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("paged-kv top  [red]x[/red][31m2J]0;title, tiny  pyramidal\n")


def test_once_where_the_bars_cannot_be_written():
    with serving(growing) as (url, _):
        done = run("top", url, *ONCE, PYTHONIOENCODING="ascii", FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"pool +\?+  6 of 10 pages held", done.stdout)
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "", {}), "{url}/metrics answers 404 Not Found"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "{url}/metrics answers 302 Found"),
        ("<html>hello</html>", "{url}/metrics answers something else than metrics"),
        ('vllm:x{a="' + "9" * 400, "{url}/metrics answers something else than metrics"),
        (f"vllm:x {'9' * 400}", "{url}/metrics answers something else than metrics"),
        ("python_info 1\n", "no metrics of vLLM here: another server, or one with"),
    ],
)
def test_once_without_an_answer(answer, message, capsys):
    with serving(lambda _: answer) as (url, asked):
        assert cli.main(["top", url, *ONCE]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"paged-kv: error: {message.format(url=url)}")
    assert (output.out, len(asked)) == ("", 1)


def test_once_without_a_server(capsys):
    with serving(growing) as (url, _):
        pass
    assert cli.main(["top", url, *ONCE]) == 1
    error = f"paged-kv: error: {url}/metrics does not answer: [Errno 111] Connection refused\n"
    assert capsys.readouterr().err == error


def test_a_server_that_leaves_between_two_looks(capsys):
    with serving(lambda number: TEXT if number == 0 else (503, "", {})) as (url, _):
        assert cli.main(["top", url, *ONCE]) == 1
    assert "answers 503 Service Unavailable" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://h:8000", "http://h:8000/", "http://h:8000/metrics/"])
def test_urls(url):
    assert Server(url).url == "http://h:8000/metrics"
    assert Server("https://[::1]/vllm/?a=b").url == "https://[::1]/vllm/metrics?a=b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            ([url], f"URL must be a server's, such as http://127.0.0.1:8000, not {url!r}")
            for url in ("127.0.0.1:8000", "ftp://h", "http://", "http://h:port", "http://h:0",
                        "http://[::1", "http://h o", "http://h\x1b[2J", "http://hé", "file:///x")
        ),
        (["http://me:pass@h"], "URL must hold no user name: use --header 'Authorization: Basic"),
        (["http://h", "--interval", "0"], "--interval must be 0.1 to 3600 seconds, not 0"),
        (["http://h", "--interval", "nan"], "--interval must be 0.1 to 3600 seconds, not nan"),
        (["http://h", "--header", "X"], "--header must be 'NAME: VALUE', in printable ASCII, not "),
        (["http://h", "--header", "X: a\nB: c"], "--header must be 'NAME: VALUE', in printable"),
        (["http://h", "--header", ": a"], "--header must be 'NAME: VALUE', in printable ASCII"),
        (["http://h"], "top needs a terminal for its input and output: use --once without one"),
    ],
)  # fmt: skip
def test_mistakes(words, message, capsys):
    assert cli.main(["top", *words]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"paged-kv: error: {message}")
    assert output.err.count("\n") == 1


def test_an_engine_that_there_is_not(capsys):
    with serving(growing) as (url, _):
        assert cli.main(["top", url, *ONCE, "--engine", "1"]) == 2
    assert capsys.readouterr().err == "paged-kv: error: --engine must be one of 0 here, not 1\n"


def test_it_starts_without_engines():
    code = "import sys; from paged_kv import cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    with serving(growing) as (url, _):
        done = subprocess.run(
            [sys.executable, "-c", code, "top", url, *ONCE], capture_output=True, text=True
        )
    modules = done.stdout.split()
    assert "paged_kv.top.live" in modules, done.stderr
    assert not {"vllm", "torch", "transformers", "numpy"} & set(modules)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "paged_kv.cli", *words]
    return subprocess.run(
        line, capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def _take_terminal() -> None:
    """In the command's process: the terminal is its own, and Ctrl-C is not ignored there."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A terminal of 24 lines with the command in it."""

    def __init__(self, *words: str) -> None:
        self.ours, self.its = pty.openpty()
        fcntl.ioctl(self.its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.its)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paged_kv.cli", "top", *words],
            stdin=self.its, stdout=self.its, stderr=self.its,
            env=os.environ | {"TERM": "xterm-256color"},
            preexec_fn=_take_terminal,
        )  # fmt: skip
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Until the text was written."""
        end = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} is not in {self.shown!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                self.shown += os.read(self.ours, 1 << 16).decode(errors="replace")

    def end(self, keys: bytes) -> int:
        """Types keys. The exit status."""
        os.write(self.ours, keys)
        self.wait_for("\x1b[?1049l")
        return self.process.wait(30)


@contextmanager
def terminal(*words: str) -> Iterator[Any]:
    """A terminal, which must be as it was in the end."""
    opened = Terminal(*words)
    try:
        yield opened
        assert termios.tcgetattr(opened.its) == opened.before
        assert opened.shown.index("\x1b[?1049h") < opened.shown.index("\x1b[?1049l")
        assert opened.shown.rindex("\x1b[?25l") < opened.shown.rindex("\x1b[?25h")
        assert "Traceback" not in opened.shown
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.ours)
        os.close(opened.its)


@pytest.mark.parametrize("key", [b"xq", b"\x03"], ids=["q", "Ctrl-C"])
def test_live_until_a_key(key):
    with serving(growing) as (url, asked), terminal(url, "--interval", "0.1") as screen:
        screen.wait_for("output/s")  # after the second look
        assert termios.tcgetattr(screen.its)[3] & (termios.ICANON | termios.ECHO) == 0
        assert "6 of 10 pages held" in screen.shown
        assert screen.end(key) == 0
        assert len(asked) >= 2


def test_live_while_there_is_no_server():
    """It says so, and goes on asking; what it knows stays."""

    def sometimes(number: int) -> Any:
        return (503, "", {}) if number in (0, 2) else growing(number)

    with serving(sometimes) as (url, _), terminal(url, "--interval", "0.3") as screen:
        screen.wait_for("answers 503 Service Unavailable")
        assert "pool" not in screen.shown
        screen.wait_for("output/s")  # after the fourth look
        views = screen.shown.split("paged-kv top")
        failed = [view for view in views if "answers 503" in view]
        assert "6 of 10 pages held" not in failed[0]
        assert "6 of 10 pages held" in failed[1]
        assert "6 of 10 pages held" in views[-1]
        assert "503" not in views[-1]
        assert screen.end(b"q") == 0


def test_live_keys_while_a_server_is_slow():
    """It ends at once, long before the request does."""
    answers = threading.Event()

    def slow(_: int) -> str:
        answers.wait(60)
        return TEXT

    with serving(slow) as (url, _), terminal(url) as screen:
        screen.wait_for("waiting for http")
        began = time.monotonic()
        assert screen.end(b"q") == 0
        assert time.monotonic() - began < TIMEOUT - 1
        answers.set()


def test_live_terminated():
    with serving(growing) as (url, _), terminal(url) as screen:
        screen.wait_for("6 of 10 pages held")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.end(b"") == 128 + signal.SIGTERM


def test_live_mistake():
    """The terminal is as it was, with a line that says what is wrong."""
    with serving(growing) as (url, _), terminal(url, "--engine", "7") as screen:
        screen.wait_for("paged-kv: error: --engine must be one of 0 here, not 7")
        assert screen.process.wait(30) == 2
