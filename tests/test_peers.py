"""Peers in evaluations: transformers' caches, and kvpress in a process of its own."""

import ast
import io
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from paged_kv.config import CompressionConfig
from paged_kv.eval.answering import run_answers
from paged_kv.eval.cases import Case
from paged_kv.eval.peer_runs import with_peers
from paged_kv.eval.peers import kvpress_process, peers
from paged_kv.eval.prompt import Prompt
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import compat
from paged_kv.hf.driver import kvpress_child, peer_caches, peer_protocol
from paged_kv.hf.driver.loading import load_model
from paged_kv.hf.seams import logits_of

TOKENS = torch.randint(30, 200, (260,), generator=torch.Generator().manual_seed(0)).tolist()
ANSWERED = Prompt(TOKENS[:152], TOKENS[152:160], 12)
SCORED = Prompt(TOKENS[:153], targets=TOKENS[153:220])
SHORT = Prompt(TOKENS[:60], TOKENS[60:63], 12)
PYTHON = kvpress_process.interpreter(None)
REQUIRED = os.environ.get("PAGED_KV_PEERS") == "required"

needs_kvpress = pytest.mark.skipif(
    not PYTHON.exists() and not REQUIRED, reason="no kvpress: make peers"
)


# ---- transformers' caches


@torch.inference_mode()
def of_reference(model, prompt):
    """The answer and the loss of the engine that our policies are defined by."""
    engine = ReferenceEngine(model, CompressionConfig())
    if prompt.targets:
        hidden = engine.process([*prompt.context, *prompt.targets[:-1]])
        logits = logits_of(model, hidden[-len(prompt.targets) :])
        return [], F.cross_entropy(logits, torch.tensor(prompt.targets)).item()
    hidden = engine.process([*prompt.context, *prompt.question])
    tokens = [int(logits_of(model, hidden[-1:]).argmax())]
    while len(tokens) < prompt.max_new_tokens:
        tokens.append(int(logits_of(model, engine.process(tokens[-1:])).argmax()))
    return tokens, None


def test_dynamic_is_our_full(tiny):
    model = load_model(Path(tiny))
    prompts = [ANSWERED, SCORED]
    found = list(peers.answers("dynamic", Path(tiny), prompts, None))
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, nll = of_reference(model, prompt)
        assert answer.tokens == tokens
        assert answer.nll == pytest.approx(nll, abs=1e-4)
        assert answer.kept == 152
        assert answer.cache_bytes == 6 * 2 * 2 * 32 * 4 * 152  # layers, K and V, heads, size, bytes


def answered(model, prompt, change):
    """With a DynamicCache whose keys and values `change` takes and gives, after the context."""
    cache = peer_caches.CACHES["dynamic"](model)

    @contextmanager
    def compression(length):
        yield
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys, layer.values)

    argument = compat.cache_argument()
    return peer_protocol.answer(model, cache, compression, argument, **prompt._asdict())


def test_progress_counts_policies_then_peers(tiny):
    cases = [
        Case(name, None, CompressionConfig(), Path(tiny), 32)
        for name in ("dynamic", "full", "dynamic")
    ]
    steps: list[tuple[int, int | None]] = []
    run = with_peers(run_answers("reference"), None)
    with tqdm(file=io.StringIO()) as bar:
        for _ in run(
            [ANSWERED, SHORT], cases, lambda number, index: (number, index) != (0, 2), bar
        ):
            steps.append((bar.n, bar.total))
    assert steps == [(1, 2), (2, 2), (1, 4), (2, 4), (4, 4)]


def rounded(bits):
    """64 numbers in a row, which are two tokens of a head here, share a scale."""

    def of(numbers):
        rows = numbers.reshape(-1, 64)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        return (((rows - low) / scale).round() * scale + low).reshape(numbers.shape)

    return lambda keys, values: (of(keys), of(values))


@pytest.mark.parametrize("bits", [4, 2])
def test_quantized_caches_hold_packed_numbers(tiny, bits):
    if not REQUIRED:
        pytest.importorskip("optimum.quanto")
    model = load_model(Path(tiny))
    prompts = [ANSWERED, SCORED]
    found = list(peers.answers(f"quantized-int{bits}", Path(tiny), prompts, None))
    for prompt, answer in zip(prompts, found, strict=True):
        expected = answered(model, prompt, rounded(bits))
        assert answer.tokens == expected["tokens"]
        assert answer.nll == pytest.approx(expected["nll"], abs=1e-4)
        assert answer.kept == 152
        # 64 numbers in K and in V of each token and layer, with a scale and a shift in float32.
        assert answer.cache_bytes == 6 * 2 * 152 * (64 * bits // 8 + 8)


# ---- mistakes


def test_an_unknown_peer():
    with pytest.raises(
        ValueError, match=r"unknown peer 'kvpress:nope'; .*: plain, .*kvpress:knorm"
    ):
        peers.check("kvpress:nope")


def test_quanto_is_missing(monkeypatch):
    monkeypatch.setattr(peer_caches, "QUANTO", "optimum-quanto-of-nobody")
    with pytest.raises(ValueError, match=r"peer quantized-int4 needs optimum-quanto.*\[peers\]"):
        peers.check("quantized-int4")
    assert peers.check("dynamic") == {}


def test_quanto_cannot_compile(tiny, monkeypatch):
    def refuse(*args):
        raise RuntimeError("Ninja is required\nmore")

    cache = SimpleNamespace(update=refuse)
    monkeypatch.setitem(peer_caches.CACHES, "quantized-int4", lambda model: cache)
    monkeypatch.setattr(peer_caches, "check", lambda name: {})
    with pytest.raises(ValueError, match=r"takes ninja and a C\+\+ compiler \(Ninja is required\)"):
        next(peers.answers("quantized-int4", Path(tiny), [ANSWERED], None))


def interpreter(tmp_path, *lines):
    """A script that is started in place of Python."""
    path = tmp_path / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def test_there_is_no_interpreter(tmp_path, monkeypatch):
    message = r"kvpress-python .*nowhere cannot be started \(No such file.*\): make .*make peers"
    with pytest.raises(ValueError, match=message):
        peers.check("kvpress:knorm", str(tmp_path / "nowhere"))
    monkeypatch.setenv(kvpress_process.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=message):
        next(peers.answers("kvpress:knorm", tmp_path, [ANSWERED], lambda length: 64))


@pytest.mark.parametrize(
    ("version", "message"), [("null", "has no kvpress; 0"), ('"0.4.0"', "has kvpress 0.4.0; 0")]
)
def test_kvpress_is_another(tmp_path, version, message):
    python = interpreter(tmp_path, f"echo '{{\"kvpress\": {version}}}'", "cat")
    with pytest.raises(ValueError, match=message):
        peers.check("kvpress:knorm", python)


HELLO = f'echo \'{{"kvpress": "{kvpress_process.VERSION}"}}\''


@pytest.mark.parametrize("lines", [[], [HELLO, "read prompt"], [HELLO, "exec <&-", "sleep 0.2"]])
def test_the_process_dies(tmp_path, lines):
    """At once, over a prompt, and before it has read one."""
    python = interpreter(tmp_path, *lines, "echo out of luck >&2", "exit 3")
    with pytest.raises(RuntimeError, match=r"(?s)died \(exit status 3\).*out of luck"):
        list(kvpress_process.answers(Path(python), tmp_path, "knorm", [ANSWERED], None))


# ---- kvpress


def test_the_child_imports_nothing_of_ours():
    for module in (kvpress_child, peer_protocol):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            assert "paged_kv" not in f"{getattr(node, 'module', '')} {names}"


def test_presses_are_told_a_ratio_that_keeps_what_is_wanted():
    for length in range(2, 400):
        for kept in range(1, length):
            share = 1 - kvpress_child.ratio(length, kept)
            assert int(length * share) == round(length * share) == kept


def lowest_norms(kept):
    def of(keys, values):
        index = keys.norm(dim=-1).topk(min(kept, keys.shape[2]), largest=False).indices
        index = index[..., None].expand(-1, -1, -1, 32)
        return keys.gather(2, index), values.gather(2, index)

    return of


@needs_kvpress
def test_a_press_keeps_the_budget_and_is_measured_as_we_are(tiny):
    """kvpress with its transformers, against the definition of this press with ours."""
    assert peers.check("kvpress:knorm")["kvpress"] == kvpress_process.VERSION
    model = load_model(Path(tiny))
    prompts = [ANSWERED, SCORED, SHORT]
    found = list(peers.answers("kvpress:knorm", Path(tiny), prompts, lambda length: 70))
    assert [answer.kept for answer in found] == [70, 70, 60]
    for prompt, answer in zip(prompts, found, strict=True):
        expected = answered(model, prompt, lowest_norms(70))
        assert answer.tokens == expected["tokens"]
        assert answer.nll == pytest.approx(expected["nll"], abs=1e-4)
        assert answer.cache_bytes == expected["cache_bytes"]
