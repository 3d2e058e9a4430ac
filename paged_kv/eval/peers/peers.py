"""Peers by name, and their answers.

plain            vLLM as it is, in the dtype of a server: keeps all
plain-fp8        the same with vLLM's fp8 pages
dynamic          transformers' own cache, which keeps all: what `full` must equal
quantized-int4   transformers' QuantizedCache by optimum-quanto: keeps all, in 4 bits
quantized-int2   in 2
kvpress:NAME     a press of kvpress with its defaults, in an interpreter of its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paged_kv.bench.cases import PEERS as SERVED
from paged_kv.eval.peers import kvpress_process, plain_vllm
from paged_kv.eval.prompt import Answer, Prompt

PREFIX = "kvpress:"
CACHES = ("dynamic", "quantized-int4", "quantized-int2")
NAMES = (*SERVED, *CACHES, *(PREFIX + press for press in kvpress_process.PRESSES))


def keeps_all(name: str) -> bool:
    """Whether a budget means nothing to the peer."""
    return name in SERVED or name in CACHES


def engine(name: str) -> str:
    """What runs the peer: vllm, hf, or kvpress."""
    if name in SERVED:
        return "vllm"
    return "hf" if name in CACHES else PREFIX.rstrip(":")


def check(name: str, kvpress_python: str | None = None) -> dict[str, str]:
    """Looks at what needs no model; the versions of packages that are the peer's.

    Args:
        name: of the peer.
        kvpress_python: see `answers`.

    Raises:
        ValueError: there is no such peer, or what it needs is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown peer {name!r}; known are: {', '.join(NAMES)}")
    if name in SERVED:
        return plain_vllm.check(name)
    if name in CACHES:
        from paged_kv.hf.driver import peer_caches

        return peer_caches.check(name)
    return kvpress_process.check(kvpress_process.interpreter(kvpress_python))


def answers(
    name: str,
    model_dir: Path,
    prompts: Sequence[Prompt],
    kept: Callable[[int], int] | None,
    kvpress_python: str | None = None,
) -> Iterator[Answer]:
    """One answer for each prompt, in order, while they are made.

    Bytes are those of keys and values as the peer stores them, scales and shifts included.

    Args:
        name: one of NAMES.
        model_dir: a model directory; it runs in float32, but in vLLM as it would be served.
        prompts: what to answer.
        kept: from the tokens that are compressed to the entries to keep of them, in every layer and
            head; None keeps all.
        kvpress_python: the interpreter of an environment with kvpress; None for that of the
            variable PAGED_KV_KVPRESS_PYTHON, or of `make peers`.

    Raises:
        ValueError: what the peer needs is not installed, or it does not take the model.
        RuntimeError: the peer's process died; with the end of what it printed.
    """
    assert name in NAMES
    assert kept is None or not keeps_all(name), f"{name} keeps all entries"
    if name in SERVED:
        yield from plain_vllm.answers(name, model_dir, prompts)
        return
    if name in CACHES:
        from paged_kv.hf.driver import peer_caches

        found = peer_caches.answers(name, model_dir, (prompt._asdict() for prompt in prompts))
    else:
        press, python = name.removeprefix(PREFIX), kvpress_process.interpreter(kvpress_python)
        found = kvpress_process.answers(python, model_dir, press, prompts, kept)
    for fields in found:
        yield Answer(**fields)
