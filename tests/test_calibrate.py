"""`paged-kv calibrate formats`: what it measures, the worst layers get int8, and its mistakes."""

import json
import re

import pytest
import reference_loop
import tiny_models
import torch

from paged_kv import cli
from paged_kv.eval.calibrate_formats import choose
from paged_kv.hf import PagedCache
from paged_kv.quant import QUANTIZED

NUM_LAYERS, TOKENS = 6, 90


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 300)


def calibrate(tiny, text, output, *args) -> int:
    given = ["--model", tiny, "--text", text, "--output", output, "--tokens", TOKENS, *args]
    return cli.main(["calibrate", "formats", *map(str, given)])


def log_probabilities(model, ids, formats: dict[int, str]) -> torch.Tensor:
    """By transformers' own cache, whose layers hold what the codecs make of keys and values."""
    from transformers import DynamicCache

    class Coded(DynamicCache):
        def update(self, key, value, layer, *args, **more):
            if layer in formats:
                codec = QUANTIZED[formats[layer]](key.shape[-1])
                key, value = (codec.decode(codec.encode(part)) for part in (key, value))
            return super().update(key, value, layer, *args, **more)

    with torch.inference_mode():
        found = model(ids, past_key_values=Coded(config=model.config)).logits[0]
    return found.log_softmax(-1)


def test_the_file_the_table_and_what_they_say(tiny, text, tmp_path, capsys):
    output = tmp_path / "formats.json"
    assert calibrate(tiny, text, output, "--int8-layers", 2) == 0
    found = json.loads(output.read_text())
    costs, layers = found["measured"]["int4_divergence"], found["layers"]
    assert len(costs) == NUM_LAYERS
    assert sorted(layers) == ["int4"] * 4 + ["int8"] * 2
    worst = min(costs[i] for i in range(NUM_LAYERS) if layers[i] == "int8")
    assert worst >= max(costs[i] for i in range(NUM_LAYERS) if layers[i] == "int4")

    model = reference_loop.load_model(tiny)
    words = text.read_text().split()[: TOKENS - 1]
    from paged_kv.hf.driver.loading import encode

    tokens = encode(tiny, text.read_text())[:TOKENS]
    assert len(words) == TOKENS - 1
    ids = torch.tensor([tokens[:-1]])
    native = log_probabilities(model, ids, {})
    for layer in (0, 4):
        one = log_probabilities(model, ids, {layer: "int4"})
        expected = (native.exp() * (native - one)).sum(-1).mean().item()
        assert costs[layer] == pytest.approx(expected, rel=0.02)

    results = found["measured"]["results"]
    loss = -native.gather(1, torch.tensor(tokens[1:])[:, None]).mean().item()
    assert results["native"]["nll"] == pytest.approx(loss, abs=1e-4)
    assert abs(results["native"]["divergence"]) < 1e-6
    assert results["int8"]["divergence"] < results["this"]["divergence"]
    assert results["this"]["divergence"] < results["int4"]["divergence"]
    heads, numbers = 2, 2 * 32
    sizes = {"native": numbers * 4, "int8": numbers + 4, "int4": numbers // 2 + 8}
    for name, size in sizes.items():
        assert results[name]["bytes_per_token"] == NUM_LAYERS * heads * size
    assert results["this"]["bytes_per_token"] == heads * (4 * sizes["int4"] + 2 * sizes["int8"])

    table, rest = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"(int\d)$", table, re.M) == layers
    assert [line.split()[0] for line in rest.splitlines()] == ["pages", *results]
    with PagedCache(model.config, page_format=str(output)) as cache, torch.inference_mode():
        model(ids, past_key_values=cache)
        pages = -(-(TOKENS - 1) // 32) * 32
        assert cache.stats().bytes == pages * results["this"]["bytes_per_token"]


def test_who_gets_int8():
    costs = {0: 1.0, 2: 3.0, 3: 3.0, 5: 2.0}
    assert choose(costs, 0) == dict.fromkeys(costs, "int4")
    assert choose(costs, 1) == {0: "int4", 2: "int8", 3: "int4", 5: "int4"}
    assert choose(costs, 3) == {0: "int4", 2: "int8", 3: "int8", 5: "int8"}
    assert choose(costs, 4) == dict.fromkeys(costs, "int8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "/nowhere"], "text /nowhere: no such file"),
        (["--output", "/nowhere/x.json"], "must be a .json file in a directory that exists"),
        (["--output", "x.txt"], "output x.txt must be a .json file"),
        (["--tokens", "1"], "tokens must be at least 2"),
        (["--tokens", "1000"], "has 300 tokens"),
        (["--int8-layers", "7"], "int8-layers must be an integer from 0 to 6"),
        (["--int8-layers", "-1"], "int8-layers must be an integer from 0 to 6"),
        (["--model", "/nowhere"], "model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(tiny, text, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.setattr("paged_kv.eval.layer_costs.load_model", None)  # none gets that far
    assert calibrate(tiny, text, tmp_path / "x.json", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paged-kv: error: ")
    assert message in line
    assert not (tmp_path / "x.json").exists()
