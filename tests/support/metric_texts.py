"""What servers say on /metrics, for `paged-kv top`: texts with numbers that tests choose; and a
server that says them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str, dict[str, str]]  # status, text, headers


def line(name: str, value: object, **labels: str) -> str:
    """A sample; label values are escaped as Prometheus does."""
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"') for k, v in labels.items()}
    inside = ",".join(f'{k}="{v}"' for k, v in escaped.items())
    return f"vllm:{name}{{{inside}}} {value}\n"


def vllm(engine: str = "0", model: str = "tiny", **values: object) -> str:
    """vLLM's own metrics of an engine, zero if they are not given; with what is to be ignored."""
    names = ["num_requests_running", "num_requests_waiting", "num_preemptions_total"]
    names += ["prompt_tokens_total", "generation_tokens_total"]
    names += ["prefix_cache_hits_total", "prefix_cache_queries_total"]
    labels = {"engine": engine, "model_name": model}
    text = "".join(line(name, values.get(name, 0), **labels) for name in names)
    text += line("num_preemptions_created", 1.7e9, **labels)
    return text + line("time_to_first_token_seconds_bucket", 7, **labels, le="0.1")


def ours(engine: str = "0", **values: object) -> str:
    """Metrics of paged_kv that need no other labels, by name."""
    return "".join(
        line(f"paged_kv_{name}", value, engine=engine, model_name="tiny")
        for name, value in values.items()
    )


def group(number: str, held: int, freed: int, entries: int, **more: Any) -> str:
    """A layer group. more: `engine`, `policy`, `dropped` (evicted or merged)."""
    labels = {"engine": more.get("engine", "0"), "model_name": "tiny", "group": number}
    dropped = f"paged_kv_{more.get('dropped', 'evicted')}_entries_total"
    return (
        line("paged_kv_held_pages", held, **labels)
        + line("paged_kv_freed_pages_total", freed, **labels)
        + line(dropped, entries, **labels, policy=more.get("policy", "pyramidal"))
    )


def rank(number: str, compactions: int, seconds: float, engine: str = "0") -> str:
    """A worker's."""
    labels = {"engine": engine, "model_name": "tiny", "rank": number}
    text = line("paged_kv_compactions_total", compactions, **labels)
    return text + line("paged_kv_compaction_seconds_total", seconds, **labels)


def swap(out: int, full: int) -> str:
    """The swap's, and bytes by tier: requests that were swapped out, that found the swap full."""
    labels = {"engine": "0", "model_name": "tiny"}
    names = ("in_requests", "restored_tokens", "demoted_requests", "promoted_requests")
    text = "".join(line(f"paged_kv_swap_{name}_total", 0, **labels) for name in names)
    text += line("paged_kv_swap_out_requests_total", out, **labels)
    text += line("paged_kv_swap_fallbacks_total", full, **labels, reason="full")
    text += line("paged_kv_swap_fallbacks_total", 0, **labels, reason="stale")
    text += line("paged_kv_bytes", 3 << 20, **labels, tier="device", use="pages")
    return text + line("paged_kv_bytes", 3 << 19, **labels, tier="host", use="swap")


@contextmanager
def serving(answer: Callable[[int], Answer | str]) -> Iterator[tuple[str, list[Any]]]:
    """A server on this machine, which answers request 0, 1, ... so; its URL, and what it was asked:
    (path, headers)."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers))
            given = answer(len(asked) - 1)
            status, text, headers = (200, given, {}) if isinstance(given, str) else given
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # who has asked may have left
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
