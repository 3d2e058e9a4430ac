"""vLLM as it is, as a peer in evaluations."""

from functools import partial
from pathlib import Path

import pytest
import torch

from paged_kv import cli, results
from paged_kv.bench.settings import resolved_dtype
from paged_kv.eval.peers import peers, plain_vllm
from paged_kv.eval.prompt import Prompt
from paged_kv.hf import compat
from paged_kv.hf.driver import peer_caches, peer_protocol
from paged_kv.hf.driver.loading import load_model
from paged_kv.model_rules import DTYPE_BYTES

TOKENS = torch.randint(30, 200, (260,), generator=torch.Generator().manual_seed(0)).tolist()
ANSWERED = Prompt(TOKENS[:152], TOKENS[152:160], 12)
SCORED = Prompt(TOKENS[:153], targets=TOKENS[153:220])
SHORT = Prompt(TOKENS[:60], TOKENS[60:63], 12)
needs_fp8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 pages need AVX-512"
)


def cut_off(numbers):
    """As vLLM's CPU kernels write e4m3: without a scale, towards zero."""
    exponent = numbers.abs().clamp(min=2**-6).log2().floor()  # the smallest is that of subnormals
    unit = (exponent - 3).exp2()
    return (numbers / unit).trunc() * unit


def cache_of(model, change):
    """transformers' own, whose keys and values are changed before any token sees them."""
    cache = peer_caches.CACHES["dynamic"](model)
    update = cache.update

    def changed_update(keys, values, *args, **options):
        return update(change(keys), change(values), *args, **options)

    cache.update = changed_update
    return cache


PLAIN = [
    ("plain", torch.clone, 4),
    pytest.param("plain-fp8", cut_off, 1, marks=needs_fp8),
]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "change", "number_bytes"), PLAIN)
def test_plain_vllm_is_transformers_with_its_pages(tiny, monkeypatch, name, change, number_bytes):
    monkeypatch.setattr(plain_vllm, "resolved_dtype", lambda asked: "float32")  # to be equal
    model, argument = load_model(Path(tiny)), compat.cache_argument()
    prompts = [ANSWERED, SHORT, SCORED]
    answers = [*peers.answers(name, Path(tiny), prompts[:2], None)]
    answers += peers.answers(name, Path(tiny), prompts[2:], None)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.kept == len(prompt.context)
        assert answer.cache_bytes == 6 * 2 * 2 * 32 * number_bytes * len(prompt.context)
        of = partial(peer_protocol.answer, model, argument=argument, **prompt._asdict())
        expected, native = of(cache_of(model, change)), of(cache_of(model, torch.clone))
        if name == "plain":
            assert list(answer.tokens) == expected["tokens"]
        if prompt.targets:
            # Beside fp8 pages vLLM multiplies in fewer bits than float32 has.
            tolerance = 2e-4 if name == "plain" else 5e-3
            assert answer.nll == pytest.approx(expected["nll"], abs=tolerance)
            assert name == "plain" or abs(answer.nll - native["nll"]) > 4 * tolerance


@pytest.mark.vllm
@pytest.mark.slow
def test_plain_vllm_runs_as_it_is_served(tiny, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("one two three four five six seven eight nine ten " * 60)
    line = ["eval", "perplexity", "--model", tiny, "--text", str(text), "--policy", "full,plain"]
    sizes = ["--prompt-tokens", "128", "--score-tokens", "32", "--windows", "2"]
    assert cli.main([*line, *sizes, "--out", str(out)]) == 0
    full, plain = results.read([out])
    assert (full["engine"], plain["engine"]) == ("reference", "vllm")
    assert plain["nll"] == pytest.approx(full["nll"], abs=0.15), "in bfloat16"
    share = DTYPE_BYTES[resolved_dtype("auto")] / 4
    assert plain["bytes_per_token"] == pytest.approx(share * full["bytes_per_token"], rel=0.01)


def test_vllm_is_missing(monkeypatch):
    monkeypatch.setattr(plain_vllm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="peer plain needs vllm, which is not installed"):
        peers.check("plain")


def test_vllm_has_no_fp8_pages_here(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"peer plain-fp8: .* need AVX-512"):
        peers.check("plain-fp8")
    assert peers.check("plain") == {}
