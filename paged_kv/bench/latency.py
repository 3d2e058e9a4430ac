"""`paged-kv bench latency`: the time from token to token of `vllm serve`, for policies and peers.

Requests arrive as a Poisson process of --request-rate; vLLM's own client (`vllm bench serve`) sends
them and takes the times. Every case has a server of its own, with the same memory for its KV cache,
and they take turns. Fields: benchmarks/README.md.
"""

from __future__ import annotations

import argparse

from paged_kv.bench import arguments, serving
from paged_kv.bench.script import add_start, positive
from paged_kv.bench.series import Score

SCORE = Score(
    "latency",
    "itl_ms",
    False,
    lambda served: served.times["itl_ms"],
    ("share", "input_len", "requests", "request_rate", "score", "ratio", "itl_p99_ms", "ttft_ms",
        "ttft_p99_ms", "tokens_per_second", "running", "preemptions"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv bench latency`."""
    arguments.add_shared(parser, policy="plain,pyramidal", input_len=512, output_len=256,
        requests=48, pool=0.5)  # fmt: skip
    add_start(parser)
    parser.add_argument("--request-rate", type=arguments.listed(arguments.rate), default=[1.0],
        metavar="R[,R...]", help="requests per second; inf: all at once (default 1)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=3, metavar="N",
        help="times that every case runs; medians are over these (default 3)")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs, writes, prints. Raises ValueError for what the user got wrong."""
    serving.main(args, SCORE)
