"""`paged-kv eval perplexity`: several windows, standard errors, the divergence from `full`."""

import math
from statistics import fmean, stdev

import engines
import perplexity_rows
import pytest
import tiny_models
import torch

from paged_kv import cli
from paged_kv.config import CompressionConfig
from paged_kv.eval import scoring
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf.driver.loading import encode, load_model

PROMPT, SCORED = 120, 40  # a page of 32 can go
SHORT = ["--prompt-tokens", PROMPT, "--score-tokens", SCORED]
POLICIES = ["--policy", "full,snapkv,h2o", "--budget", 80]  # h2o has a prompt of its own
NEED = {"prompt": PROMPT + SCORED + 1, "stream": PROMPT + SCORED}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 500)


@pytest.fixture
def perplexity(tiny, text, capsys):
    """Runs the command; its rows."""
    return lambda *args: perplexity_rows.run(capsys, tiny, text, *args)


# ---- windows


@pytest.mark.parametrize(
    ("protocol", "offset", "stride"), [("prompt", 7, None), ("stream", 0, None), ("prompt", 0, 90)]
)
def test_windows_are_single_runs(perplexity, protocol, offset, stride):
    args = [*POLICIES, *SHORT, "--protocol", protocol]
    more = ["--stride", stride] if stride else []
    rows = perplexity(*args, "--offset", offset, "--windows", 3, *more)
    offsets = [offset + index * (stride or NEED[protocol]) for index in range(3)]
    assert len(rows) == 3
    for row in rows:
        assert [window["offset"] for window in row["windows"]] == offsets
    for index, place in enumerate(offsets):
        for row, alone in zip(rows, perplexity(*args, "--offset", place), strict=True):
            assert row["windows"][index] == alone["windows"][0]
            assert alone["windows"] == [{"offset": place, "nll": alone["nll"], "kl": alone["kl"]}]
            assert (row["kept"], row["bytes_per_token"]) == (
                alone["kept"],
                alone["bytes_per_token"],
            )


def test_means_and_standard_errors(perplexity):
    rows = perplexity(*POLICIES, *SHORT, "--windows", 3)
    first = [window["nll"] for window in rows[0]["windows"]]
    for row in rows:
        nll = [window["nll"] for window in row["windows"]]
        kl = [window["kl"] for window in row["windows"]]
        differences = [one - other for one, other in zip(nll, first, strict=True)]
        for name, values in (("nll", nll), ("kl", kl), ("vs_first", differences)):
            assert row[name] == pytest.approx(fmean(values), abs=3e-6), name
            error = stdev(values) / math.sqrt(3)
            assert row[f"{name}_se"] == pytest.approx(error, abs=3e-6), name
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]), rel=1e-4)
    assert rows[0]["vs_first"] == rows[0]["vs_first_se"] == rows[0]["kl"] == rows[0]["kl_se"] == 0
    assert all(row["nll_se"] > 0 and row["kl"] > 0 and row["kl_se"] > 0 for row in rows[1:])


def test_one_window_has_no_standard_error(perplexity):
    for row in perplexity(*POLICIES, *SHORT):
        assert row["nll_se"] is row["kl_se"] is row["vs_first_se"] is None


def test_the_first_case_is_compared_with(perplexity):
    first, full = perplexity("--policy", "streaming,full", "--budget", 80, *SHORT)
    assert first["vs_first"] == 0
    assert full["vs_first"] == pytest.approx(full["nll"] - first["nll"], abs=2e-6)
    assert first["kl"] > full["kl"] == 0


def test_the_table_leaves_out_what_is_not_known(tiny, text, capsys):
    command = ["eval", "perplexity", "--model", tiny, "--text", text, *SHORT, *POLICIES]
    for windows in (1, 2):
        assert cli.main([str(part) for part in [*command, "--windows", windows]]) == 0
        output = capsys.readouterr()
        header, *lines = output.out.splitlines()
        assert len({len(line) for line in (header, *lines)}) == 1
        assert "windows" not in header
        errors = sum(name.endswith("_se") for name in header.split())
        empty = errors if windows == 1 else 0
        assert [len(line.split()) for line in lines[1:]] == [len(header.split()) - empty] * 2
        assert f"{3 * windows * NEED['prompt']}/{3 * windows * NEED['prompt']}" in output.err


# ---- the divergence


def by_hand(model, config, tokens, protocol) -> torch.Tensor:
    """Log-probabilities [scored, vocabulary] in float64."""
    engine = ReferenceEngine(model, CompressionConfig.from_dict(config))
    if protocol == "stream":
        logits = torch.cat([engine.logits(engine.process([token])) for token in tokens])
        logits = logits[PROMPT - 1 : PROMPT + SCORED - 1]
    else:
        engine.process(tokens[:PROMPT])
        logits = engine.logits(engine.process(tokens[PROMPT : PROMPT + SCORED], compact=False))
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("protocol", ["prompt", "stream"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_kl_by_hand(perplexity, tiny, text, monkeypatch, protocol, policy):
    monkeypatch.setattr(scoring, "MOST_ROWS", 16)  # parts of a window
    config = {"policy": policy, "budget": 80, "compress_prefill": True}
    model, tokens = load_model(tiny), encode(tiny, text.read_text())[: NEED[protocol]]
    p = by_hand(model, {}, tokens, protocol)
    q = by_hand(model, config, tokens, protocol)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    args = ["--policy", policy, "--budget", 80, "--protocol", protocol]
    (row,) = perplexity(*args, *SHORT)
    assert expected > 1e-3
    assert row["kl"] == pytest.approx(expected, abs=2e-6)


def test_kl_is_from_the_native_full_cache(perplexity):
    rows = perplexity("--policy", "full", "--page-format", "int8,native,int4", *SHORT)
    int8, native, int4 = (row["kl"] for row in rows)
    assert 0 == native < int8 < int4


# ---- the other engine


@pytest.mark.vllm
def test_engines_agree_on_windows(perplexity):
    args = ["--policy", "full,snapkv", "--budget", 80, *SHORT, "--windows", 2]
    ours = perplexity(*args)
    with engines.without_collections():
        theirs = perplexity(*args, "--engine", "vllm")
    for one, other in zip(ours, theirs, strict=True):
        assert other["kl"] is other["kl_se"] is None
        for name in ("nll", "nll_se", "vs_first", "vs_first_se"):
            assert other[name] == pytest.approx(one[name], abs=1e-4), name
        for window, same in zip(one["windows"], other["windows"], strict=True):
            assert same == {**window, "kl": None, "nll": pytest.approx(window["nll"], abs=1e-4)}
