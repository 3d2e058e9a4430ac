"""Peers by name, and their answers.

dynamic          transformers' own cache, which keeps all: what `full` must equal
quantized-int4   transformers' QuantizedCache by optimum-quanto: keeps all, in 4 bits
quantized-int2   in 2
kvpress:NAME     a press of kvpress with its defaults, in an interpreter of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from paged_kv.eval.peers import kvpress_process
from paged_kv.eval.prompt import Prompt

PREFIX = "kvpress:"
CACHES = ("dynamic", "quantized-int4", "quantized-int2")
NAMES = (*CACHES, *(PREFIX + press for press in kvpress_process.PRESSES))


class Answer(NamedTuple):
    """What a peer made of a prompt.

    Args:
        tokens: the answer, with the end token if it came; none where targets were scored.
        nll: of the targets, mean, in nats; None without any.
        kept: entries of the context per layer after compression, mean over layers.
        cache_bytes: of their keys and values as they are stored, scales and shifts included.
        seconds: of this prompt.
    """

    tokens: list[int]
    nll: float | None
    kept: float
    cache_bytes: int
    seconds: float


def keeps_all(name: str) -> bool:
    """Whether a budget means nothing to the peer."""
    return name in CACHES


def check(name: str, kvpress_python: str | None = None) -> None:
    """Looks at what needs no model.

    Args:
        name: of the peer.
        kvpress_python: see `answers`.

    Raises:
        ValueError: there is no such peer, or what it needs is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown peer {name!r}; known are: {', '.join(NAMES)}")
    if keeps_all(name):
        from paged_kv.hf.driver import peer_caches

        peer_caches.check(name)
    else:
        kvpress_process.check(kvpress_process.interpreter(kvpress_python))


def answers(
    name: str,
    model_dir: Path,
    prompts: Iterable[Prompt],
    kept: int | None,
    kvpress_python: str | None = None,
) -> Iterator[Answer]:
    """One answer for each prompt, in order, while they are made.

    Args:
        name: one of NAMES.
        model_dir: a model directory; it runs in float32.
        prompts: what to answer.
        kept: entries to keep per layer and head; None for peers that keep all.
        kvpress_python: the interpreter of an environment with kvpress; None for that of the
            variable PAGED_KV_KVPRESS_PYTHON, or of `make peers`.

    Raises:
        ValueError: what the peer needs is not installed, or it does not take the model.
        RuntimeError: the peer's process died; with the end of what it printed.
    """
    assert name in NAMES
    if keeps_all(name):
        assert kept is None, f"{name} keeps all entries"
        from paged_kv.hf.driver import peer_caches

        found = peer_caches.answers(name, model_dir, prompts)
    else:
        press, python = name.removeprefix(PREFIX), kvpress_process.interpreter(kvpress_python)
        found = kvpress_process.answers(python, model_dir, press, prompts, kept)
    for fields in found:
        yield Answer(**fields)
