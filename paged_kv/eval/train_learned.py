"""`paged-kv train-learned`: fits the network of the policy `learned` to a model's own attention.

Each context of a text is run with a full cache. The label of an entry of its first half is what
that entry gets from the queries of the second half: what H2O would want to know beforehand. The
network sees what paged_kv.policies.learned.features says and learns the logarithm of the label,
standardised per layer and KV head, since a policy ranks entries within a head. One context in ten
is held out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.config import CompressionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from paged_kv.eval.reference.collect import Sample

HELD_OUT = 0.1
BATCH = 4096
LEARNING_RATE = 1e-2  # falls linearly to 0
TINY = 1e-9  # of an attention, below which entries do not differ


class Network(NamedTuple):
    """The arrays of the .npz file; see paged_kv.policies.learned."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [...] of features [..., 5]."""
        hidden = ((x - self.mean) / self.std @ self.w1 + self.b1).tanh()
        return (hidden @ self.w2 + self.b2).squeeze(-1)


class Quality(NamedTuple):
    """Means over contexts, layers and KV heads."""

    recall: float  # of the entries that will get most attention
    rank_correlation: float  # Spearman's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv train-learned`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8")
    add("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    add("--tokens", type=positive, default=16384, metavar="N", help="to train on, default 16384")
    add("--context", type=positive, default=1024, metavar="N", help="tokens, default 1024")
    add("--epochs", type=positive, default=10, metavar="N", help="default 10")
    add("--hidden", type=positive, default=16, metavar="N", help="size of the layer, default 16")
    add("--seed", type=int, default=0, help="default 0")
    add("--budget", type=float, default=0.5, metavar="F", help="kept, for the recall (default 0.5)")


def main(args: argparse.Namespace) -> None:
    """Collects, trains, writes, prints. Raises ValueError for what the user got wrong."""
    check(args)
    num_contexts = args.tokens // args.context
    model = models.resolve(args.model)
    contexts = read_contexts(model, args.text, num_contexts, args.context)
    samples, num_layers = collect_all(model, contexts)
    training, held_out = split(samples, args.seed)
    network = train(training, args.hidden, args.epochs, args.seed)
    save(args.out, network, num_layers)
    _print(args, quality(network, held_out, args.budget), newest(held_out, args.budget))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for values that cannot work."""
    defaults = CompressionConfig()
    protected = defaults.num_sink_tokens + defaults.recent_window
    if args.context < 4 * protected:
        raise ValueError(
            f"context {args.context} must be at least {4 * protected}: in its first half, the "
            f"{protected} entries that are never dropped are left out"
        )
    if args.tokens < 2 * args.context:
        raise ValueError(
            f"tokens {args.tokens} must be at least 2 x context {args.context}: one is held out"
        )
    if not 0 < args.budget < 1:
        raise ValueError(f"budget must be a number between 0 and 1, not {args.budget}")
    if not args.text.is_file():
        raise ValueError(f"text {args.text}: no such file")
    if not args.out.parent.is_dir():
        raise ValueError(f"out {args.out}: no such directory {args.out.parent}")


def read_contexts(model: Path, file: Path, count: int, size: int) -> list[list[int]]:
    """Pieces of a text, evenly spaced over all of it. Raises ValueError: it is too short."""
    from paged_kv.hf.driver.loading import encode

    tokens = encode(model, file.read_text(encoding="utf-8", errors="replace"))
    room = len(tokens) - size
    if room < (count - 1) * size:
        raise ValueError(f"text {file} has {len(tokens)} tokens, fewer than {count} x {size}")
    starts = [room * index // (count - 1) for index in range(count)]
    return [tokens[start : start + size] for start in starts]


def collect_all(directory: Path, contexts: Sequence[list[int]]) -> tuple[list[Sample], int]:
    """(a sample of each context, cut in the middle; layers of the model)."""
    from paged_kv.eval.reference.collect import collect
    from paged_kv.hf.driver.loading import load_model

    model = load_model(directory)
    progress = tqdm(contexts, desc="collecting", unit="context", file=sys.stderr)
    samples = [collect(model, context, len(context) // 2) for context in progress]
    return samples, model.config.get_text_config().num_hidden_layers


def split(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(to train on, held out), at random."""
    import torch

    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(HELD_OUT * len(samples)))
    return [samples[i] for i in order[count:]], [samples[i] for i in order[:count]]


def train(samples: list[Sample], hidden: int, epochs: int, seed: int) -> Network:
    """Least squares by AdamW."""
    import torch

    x = torch.cat([sample.features.flatten(0, -2) for sample in samples])
    y = torch.cat([targets(sample).flatten() for sample in samples])
    generator = torch.Generator().manual_seed(seed)

    def weights(rows: int, columns: int) -> Tensor:
        w = torch.randn(rows, columns, generator=generator) / rows**0.5
        return w.requires_grad_()

    zeros = [torch.zeros(size, requires_grad=True) for size in (hidden, 1)]
    w1, w2 = weights(x.shape[1], hidden), weights(hidden, 1)
    std = x.std(0)
    std = torch.where(std > 0, std, torch.ones(()))  # a feature that never varies says nothing
    network = Network(w1, zeros[0], w2, zeros[1], x.mean(0), std)
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(network[:4], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with tqdm(total=steps, desc="training", unit="step", file=sys.stderr) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(BATCH):
                loss = (network(x[batch]) - y[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return Network(*(tensor.detach() for tensor in network))


def targets(sample: Sample) -> Tensor:
    """float32 [layers, kv_heads, m]: log attention, of mean 0 and deviation 1 in each head."""
    logs = sample.attention.clamp_min(TINY).log()
    deviation = logs.std(-1, keepdim=True).clamp_min(TINY)
    return (logs - logs.mean(-1, keepdim=True)) / deviation


def quality(network: Network, samples: list[Sample], budget: float) -> Quality:
    """Of the network's choice of a fraction `budget` of the entries."""
    return _quality([network(sample.features) for sample in samples], samples, budget)


def newest(samples: list[Sample], budget: float) -> Quality:
    """Of keeping the newest instead."""
    import torch

    positions = [torch.arange(sample.attention.shape[-1]) for sample in samples]
    scores = [
        index.expand_as(sample.attention) for index, sample in zip(positions, samples, strict=True)
    ]
    return _quality(scores, samples, budget)


def _quality(scores: list[Tensor], samples: list[Sample], budget: float) -> Quality:
    """Scores [layers, kv_heads, m] against the attention to come."""
    recalls, correlations = [], []
    for score, sample in zip(scores, samples, strict=True):
        size = score.shape[-1]
        count = max(1, round(budget * size))
        ranks, wanted = (x.argsort(-1).argsort(-1) for x in (score, sample.attention))
        hits = (ranks >= size - count) & (wanted >= size - count)
        recalls.append(hits.float().sum(-1).mean() / count)
        deviations = [(rank - (size - 1) / 2).float() for rank in (ranks, wanted)]
        product = (deviations[0] * deviations[1]).sum(-1)
        correlations.append((product / deviations[0].square().sum(-1)).mean())
    return Quality(*(float(sum(values)) / len(samples) for values in (recalls, correlations)))


def save(file: Path, network: Network, num_layers: int) -> None:
    """Writes what paged_kv.policies.learned.load reads."""
    import numpy as np

    arrays: dict[str, Any] = {name: x.numpy() for name, x in network._asdict().items()}
    with file.open("wb") as out:  # given a name, numpy would add .npz to another ending
        np.savez(out, num_layers=np.array(num_layers), **arrays)


def _print(args: argparse.Namespace, result: Quality, baseline: Quality) -> None:
    print(
        f"held out: recall of the top {args.budget:.0%} by attention to come {result.recall:.3f} "
        f"(the newest: {baseline.recall:.3f}), rank correlation {result.rank_correlation:.3f} "
        f"({baseline.rank_correlation:.3f})\nwrote {args.out}"
    )
