"""`paged-kv eval perplexity`: its numbers, how they are printed, and that both engines agree."""

import json
import math
from pathlib import Path

import engines
import perplexity_rows
import pytest
import reference_loop
import tiny_models
import torch
import torch.nn.functional as F
from coded_cache import coded_cache

from paged_kv import cli, results
from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf.driver.loading import encode, load_model
from paged_kv.quant import QUANTIZED

FIELDS = ["policy", "budget", "page_format", "protocol", "nll", "nll_se", "ppl", "kl", "kl_se"]
FIELDS += ["vs_first", "vs_first_se", "kept", "bytes_per_token", "seconds"]
KV_BYTES = 6 * 2 * 2 * 32 * 4  # of a token of the tiny model, in float32
SHORT = ["--prompt-tokens", "160", "--score-tokens", "100"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture
def perplexity(tiny, text, capsys):
    """Runs the command; its rows."""

    def run(*args, model=tiny, file=text) -> list[dict]:
        return perplexity_rows.run(capsys, model, file, *args)

    return run


# ---- what is printed


def test_rows(perplexity):
    args = ["--policy", "full,streaming,knorm", "--budget", "96,0.5", *SHORT]
    rows = perplexity(*args, "--policy-config", '{"min_budget": 70}')
    for row in rows:
        assert set(row) >= {*FIELDS, "windows", *results.FIELDS, *results.PROVENANCE}
        assert (row["task"], row["metric"], row["score"]) == ("perplexity", "nll", row["nll"])
        assert (row["standard_error"], row["samples"]) == (row["nll_se"], 1)
    found = [(row["policy"], row["budget"], row["kept"]) for row in rows]
    expected = [("full", None, 160.0)]
    expected += [
        (name, *pair) for name in ("streaming", "knorm") for pair in [(96, 96.0), (0.5, 96.0)]
    ]
    assert found == expected
    for row in rows:
        assert row["protocol"] == "prompt"
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]), rel=1e-4)
        assert row["bytes_per_token"] == KV_BYTES * row["kept"] / 160
        assert row["seconds"] > 0
    assert len({row["nll"] for row in rows}) == 3


def test_table(tiny, text, capsys):
    command = ["eval", "perplexity", "--model", tiny, "--text", str(text), *SHORT]
    assert cli.main([*command, "--policy", "full,streaming", "--budget", "96"]) == 0
    output = capsys.readouterr()
    header, full, streaming = output.out.splitlines()
    assert header.split() == FIELDS
    assert len(header) == len(full) == len(streaming)
    assert full.split()[:3] == ["full", "native", "prompt"]
    assert streaming.split()[:4] == ["streaming", "96", "native", "prompt"]
    assert "streaming 96: 100%" in output.err


# ---- the numbers


def nll_of(logits, targets) -> float:
    return F.cross_entropy(logits, torch.tensor(targets)).item()


def test_full_is_the_models_own(perplexity, tiny, text):
    model, tokens = load_model(tiny), encode(tiny, text.read_text())
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    (row,) = perplexity("--policy", "full", *SHORT)
    assert row["nll"] == pytest.approx(nll_of(logits[160:260], tokens[161:261]), abs=1e-5)
    (row,) = perplexity("--policy", "full", "--protocol", "stream", "--score-tokens", 299)
    assert row["nll"] == pytest.approx(nll_of(logits[:299], tokens[1:300]), abs=1e-5)
    assert row["kept"] == 300
    (row,) = perplexity("--policy", "full", "--protocol", "stream", *SHORT, "--offset", 20)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[20:]])).logits[0]
    assert row["nll"] == pytest.approx(nll_of(logits[159:259], tokens[180:280]), abs=1e-5)


def test_prompt_is_compressed_once(perplexity, tiny, text):
    model, tokens = load_model(tiny), encode(tiny, text.read_text())
    sequence = reference_loop.Sequence_(model, reference_loop.Rule([96] * 6), 160)
    sequence.process(tokens[:160])
    sequence.drop()
    expected = nll_of(sequence.logits(sequence.process(tokens[160:260])), tokens[161:261])
    (row,) = perplexity("--policy", "streaming", "--budget", 96, *SHORT)
    assert row["nll"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("policy", ["streaming", "h2o", "snapkv"])
def test_a_stream_goes_token_by_token(perplexity, tiny, text, policy):
    model, tokens = load_model(tiny), encode(tiny, text.read_text())
    config = {"policy": policy, "budget": 96, "compress_prefill": True}
    engine = ReferenceEngine(model, CompressionConfig.from_dict(config))
    logits = torch.cat([engine.logits(engine.process([token])) for token in tokens[:300]])
    args = ["--policy", policy, "--budget", 96, "--protocol", "stream"]
    (row,) = perplexity(*args, "--score-tokens", 299)
    assert row["nll"] == pytest.approx(nll_of(logits[:299], tokens[1:300]), abs=1e-4)
    assert row["kept"] == engine.num_kept[0] == 300 - 192
    assert row["bytes_per_token"] == pytest.approx(KV_BYTES * 108 / 300, abs=0.01)


def test_scores_are_not_shared_between_policies(perplexity):
    """A prompt is processed once for those that can share it."""
    together = perplexity("--policy", "knorm,h2o,lru,snapkv", "--budget", "96,128", *SHORT)
    for row in together:
        (alone,) = perplexity("--policy", row["policy"], "--budget", row["budget"], *SHORT)
        assert alone["nll"] == pytest.approx(row["nll"], abs=1e-5)


# ---- page formats


def test_page_formats(perplexity, tiny, text):
    """Loss by a plain cache whose entries went through the codec; bytes as pages store them."""
    args = ["--policy", "full,snapkv", "--budget", "96", "--page-format", "native,int8,fp8,int4"]
    rows = perplexity(*args, *SHORT)
    assert [row["page_format"] for row in rows[::2]] == ["native", "int8", "fp8", "int4"]
    model, tokens = load_model(tiny), encode(tiny, text.read_text())

    native = rows[0]["nll"]
    for full, snapkv in zip(rows[2::2], rows[3::2], strict=True):
        codec = QUANTIZED[full["page_format"]](32)
        with torch.inference_mode():
            coded = coded_cache(model, full["page_format"])
            logits = model(torch.tensor([tokens[:261]]), past_key_values=coded).logits[0]
        expected = nll_of(logits[160:260], tokens[161:261])
        # Kernels round logits in another order, after which some numbers get other codes.
        assert abs(full["nll"] - expected) < 0.3 * abs(native - expected)
        assert full["bytes_per_token"] == 6 * 2 * 2 * codec.num_bytes
        assert snapkv["bytes_per_token"] == full["bytes_per_token"] * 96 / 160


@pytest.mark.parametrize("protocol", ["prompt", "stream"])
def test_the_residual_is_that_of_each_token(perplexity, protocol):
    """Token after token gives what pages at once give; the newest entries count as they are."""
    args = ["--policy", "streaming", "--budget", 96, "--protocol", protocol, *SHORT]
    args += ["--page-format", "int4"]
    (without,) = perplexity(*args)
    (row,) = perplexity(*args, "--residual-pages", 1)
    ring = 6 * 32 * 2 * 2 * 32 * 4
    seen = 160 if protocol == "prompt" else 260
    more = (row["bytes_per_token"] - without["bytes_per_token"]) * seen
    assert more == pytest.approx(ring, rel=1e-4)
    assert row["nll"] != without["nll"]


def test_a_stream_with_a_residual_goes_token_by_token(perplexity, tiny, text):
    model, tokens = load_model(tiny), encode(tiny, text.read_text())
    config = CompressionConfig.from_dict({"page_format": "int4", "residual_pages": 1})
    engine, losses = ReferenceEngine(model, config), []
    for token in tokens[:260]:
        losses.append(engine.logits(engine.process([token])))
    expected = nll_of(torch.cat(losses)[159:259], tokens[160:260])
    args = ["--policy", "full", "--page-format", "int4,native", "--protocol", "stream", *SHORT]
    row, native = perplexity(*args, "--residual-pages", 1)
    assert abs(row["nll"] - expected) < 0.2 * abs(expected - native["nll"])


# ---- other engines, and peers


@pytest.mark.parametrize("protocol", ["prompt", "stream"])
def test_transformers_agrees(perplexity, protocol):
    policies = "full,streaming,pyramidal+streaming,snapkv,h2o,pooling"
    args = ["--policy", policies, "--budget", "112", "--protocol", protocol, *SHORT]
    args += ["--policy-config", json.dumps({"pyramid_beta": 1.5})]
    ours, theirs = perplexity(*args), perplexity(*args, "--engine", "hf")
    for one, other in zip(ours, theirs, strict=True):
        assert other["nll"] == pytest.approx(one["nll"], abs=1e-4), one["policy"]
        assert other["kl"] is None
        exact = ("policy", "budget", "protocol", "kept", "kept_by_layer", "bytes_per_token")
        assert [one[name] for name in exact] == [other[name] for name in exact]


def test_a_peer_in_the_same_run(perplexity):
    """Behind the policies; its windows are paired with those of the first case."""
    args = [*SHORT, "--windows", 2, "--stride", 50, "--budget", 96]
    full, streaming, peer = perplexity("--policy", "full,dynamic,streaming", *args)
    assert [row["policy"] for row in (full, streaming, peer)] == ["full", "streaming", "dynamic"]
    assert (full["engine"], peer["engine"]) == ("reference", "hf")
    assert peer["nll"] == pytest.approx(full["nll"], abs=1e-5)
    assert peer["vs_first"] == pytest.approx(0, abs=1e-5)
    assert peer["nll"] != streaming["nll"]
    assert (peer["kept"], peer["bytes_per_token"]) == (full["kept"], full["bytes_per_token"])
    assert (peer["kl"], "kept_by_layer" in peer) == (None, False)


@pytest.mark.vllm
@pytest.mark.parametrize("protocol", ["prompt", "stream"])
def test_engines_agree(perplexity, protocol):
    policies = "full,streaming,pyramidal+streaming,snapkv,h2o,past_future,residual,pooling"
    args = ["--policy", policies, "--budget", "112", "--protocol", protocol]
    more = {"pyramid_beta": 1.5} if protocol == "prompt" else {}
    args += [*SHORT, "--policy-config", json.dumps(more)]
    ours = perplexity(*args)
    with engines.without_collections():
        theirs = perplexity(*args, "--engine", "vllm")
    assert len(ours) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert other["nll"] == pytest.approx(one["nll"], abs=1e-4), one["policy"]
        assert other["kl"] is None  # vLLM gives no whole distributions
        exact = ("policy", "budget", "page_format", "protocol", "kept", "bytes_per_token")
        assert [one[name] for name in exact] == [other[name] for name in exact]


@pytest.mark.vllm
@pytest.mark.exhaustive
@pytest.mark.parametrize(("protocol", "residual"), [("prompt", 0), ("stream", 1)])
def test_engines_agree_on_page_formats(perplexity, protocol, residual):
    args = ["--policy", "full,snapkv", "--budget", "112", "--protocol", protocol, *SHORT]
    args += ["--page-format", "int8,int4", "--residual-pages", residual]
    (native,) = perplexity("--policy", "full", "--protocol", protocol, *SHORT)
    ours, theirs = perplexity(*args), perplexity(*args, "--engine", "vllm")
    for one, other in zip(ours, theirs, strict=True):
        cost = abs(ours[0]["nll"] - native["nll"])  # numbers near the middle of two levels differ
        assert abs(other["nll"] - one["nll"]) < 0.2 * cost
        assert other["kept"] == one["kept"]


@pytest.mark.model
def test_real_model(perplexity, smollm2_dir, tmp_path):
    """The text is predicted, the worse the less is kept; the shipped tokenizer is used."""
    file = tmp_path / "text.txt"
    pages = Path(__file__).parent.parent.glob("docs/*.md")
    file.write_text("\n".join(page.read_text() for page in sorted(pages)))
    args = ["--policy", "full,streaming", "--budget", "256,96", "--score-tokens", "256"]
    full, large, small = perplexity(*args, model=smollm2_dir, file=file)
    assert 0.1 < full["nll"] < large["nll"] < small["nll"] < 6
    assert [row["kept"] for row in (full, large, small)] == [1024, 256, 96]
    assert full["bytes_per_token"] == 46080
