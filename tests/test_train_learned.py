"""`paged-kv train-learned`: what it collects, that it learns, and what it writes."""

import random

import numpy as np
import pytest
import reference_loop
import tiny_models
import torch

from paged_kv import cli
from paged_kv.config import CompressionConfig
from paged_kv.eval import train_learned
from paged_kv.eval.reference.collect import Sample, collect

CONTEXT, CUT = 160, 80


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_models.write_text(tmp_path_factory.mktemp("text") / "text.txt", 1000)


def command(tiny, text, out, *args) -> list[str]:
    options = {"--model": tiny, "--text": text, "--out": out, "--context": CONTEXT}
    flat = [str(value) for pair in options.items() for value in pair]
    return ["train-learned", *flat, *map(str, args)]


def test_labels_are_the_attention_to_come(tiny):
    model = reference_loop.load_model(tiny)
    tokens = [random.Random(2).randrange(3, 256) for _ in range(CONTEXT)]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = model(torch.tensor([tokens]), output_attentions=True).attentions
    sample = collect(model, tokens, CUT)
    first, last = 4, CUT - 32  # sinks and the newest are never dropped
    assert sample.features.shape == (6, 2, last - first, 5)
    for layer, attention in enumerate(maps):
        of_later = attention[0, :, CUT:, first:last].unflatten(0, (2, 2)).mean((1, 2))
        torch.testing.assert_close(sample.attention[layer], of_later, atol=1e-6, rtol=1e-4)
    ages = torch.arange(CUT - first, CUT - last, -1).float()
    torch.testing.assert_close(sample.features[3, 1, :, 0], ages.log1p())
    assert (sample.features[3, ..., 4] == 0.5).all()


def random_samples(count: int, noise: float) -> list[Sample]:
    """What gets attention is known: it falls with the key norm and with age."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        features = torch.randn(3, 2, 100, 5, generator=generator)
        logs = 2 * torch.tanh(features[..., 1]) - features[..., 0]
        logs += noise * torch.randn(logs.shape, generator=generator)
        samples.append(Sample(features, logs.exp()))
    return samples


def test_it_learns_what_there_is_to_learn():
    samples = random_samples(20, noise=0.1)
    network = train_learned.train(samples[2:], 8, 30, seed=0)
    own = train_learned.quality(network, samples[:2], 0.5)
    baseline = train_learned.newest(samples[:2], 0.5)
    assert own.recall > 0.9
    assert own.rank_correlation > 0.95
    assert baseline.recall == pytest.approx(0.5, abs=0.1)
    assert baseline.rank_correlation == pytest.approx(0, abs=0.2)


def test_quality_of_a_perfect_choice():
    (sample,) = random_samples(1, noise=1)
    perfect = train_learned._quality([sample.attention], [sample], 0.3)
    assert perfect.recall == 1
    assert perfect.rank_correlation == pytest.approx(1)
    worst = train_learned._quality([-sample.attention], [sample], 0.3)
    assert worst.recall == 0
    assert worst.rank_correlation == pytest.approx(-1)


def test_command(tiny, text, tmp_path, capsys):
    outs = [tmp_path / name for name in ("one.npz", "same.npz", "other")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        more = ["--tokens", 800, "--epochs", 30, "--hidden", 4, "--seed", seed]
        assert cli.main(command(tiny, text, out, *more)) == 0
    output = capsys.readouterr()
    assert output.out.count("held out: recall of the top 50%") == 3
    assert output.out.splitlines()[-1] == f"wrote {outs[-1]}"
    assert outs[0].read_bytes() == outs[1].read_bytes()
    one, _, other = (np.load(out) for out in outs)
    shapes = {name: one[name].shape for name in one.files}
    arrays = {"w1": (5, 4), "b1": (4,), "w2": (4, 1), "b2": (1,), "mean": (5,), "std": (5,)}
    assert shapes == {**arrays, "num_layers": ()}
    assert one["num_layers"] == 6
    assert not np.array_equal(one["w1"], other["w1"])
    recall = float(output.out.split("to come ")[1].split()[0])
    assert recall > 0.55, "no better than chance"
    CompressionConfig.from_dict({"policy": "learned", "weights": str(outs[0])})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", 319], "tokens 319 must be at least 2 x context 160"),
        (["--tokens", 3200], "has 1000 tokens, fewer than 20 x 160"),
        (["--tokens", 320, "--budget", 1.5], "budget must be a number between 0 and 1, not 1.5"),
        (["--tokens", 320, "--text", "/nowhere"], "text /nowhere: no such file"),
        (["--tokens", 320, "--out", "/nowhere/a.npz"], "no such directory /nowhere"),
        (["--tokens", 320, "--context", 60], "context 60 must be at least 144"),
        (["--tokens", 320, "--model", "/nowhere"], "model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(tiny, text, tmp_path, capsys, args, message):
    assert cli.main(command(tiny, text, tmp_path / "x.npz", *args)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("paged-kv: error: ")
    assert message in line


def test_the_shipped_network():
    """Trained, and found in an installed package."""
    policy = CompressionConfig.from_dict({"policy": "learned"}).create_policy()
    assert policy.network["num_layers"] == 30
    assert 5.5 < policy.network["mean"][0] < 6.5, "mean of log(1 + age): a placeholder"
