"""`paged-kv calibrate formats`: page formats by layer, chosen on a text of yours.

A text is read once with native pages, and once for each layer with only that layer's pages in int4.
What a layer costs is how far the predictions move: the mean Kullback-Leibler divergence, in nats
per token, of the model's distribution from the one with native pages. (The loss itself is too noisy
for this: a single layer changes it by less than its error on a few hundred tokens.) The
--int8-layers that cost most get int8, which costs next to nothing; all others get int4. Layers
without full attention have no pages and stay native.

The file is what page_format takes, in vLLM and in transformers. The table shows each layer's cost;
below it are loss, divergence and bytes per token of the choice and of one format for all layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.bench.settings import decoder_config
from paged_kv.core.page_formats import NATIVE
from paged_kv.eval.task import Task, read_windows
from paged_kv.model_rules import full_attention_layers

if TYPE_CHECKING:
    from paged_kv.eval.layer_costs import Measured

SENSITIVE, OTHERS = "int8", "int4"
SHARE = 4  # by default one layer in so many is sensitive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv calibrate formats`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8, like what you will run")
    add("--output", type=Path, required=True, metavar="FILE", help="the .json file to write")
    add("--int8-layers", type=int, metavar="N",
        help=f"layers that get int8 (default: one in {SHARE})")  # fmt: skip
    add("--tokens", type=positive, default=512, metavar="N", help="of the text, default 512")


def main(args: argparse.Namespace) -> None:
    """Measures, chooses, writes, prints. Raises ValueError for what the user got wrong."""
    if not args.text.is_file():
        raise ValueError(f"text {args.text}: no such file")
    if args.output.suffix != ".json" or not args.output.parent.is_dir():
        raise ValueError(f"output {args.output} must be a .json file in a directory that exists")
    if args.tokens < 2:
        raise ValueError("tokens must be at least 2: the first predicts the second")
    directory = models.resolve(args.model)
    layers, num_sensitive = read_layers(directory, args.int8_layers)
    whole = Task(directory, "stream", 1, args.tokens - 1, 1)
    (task,) = read_windows(whole, args.text, scored="tokens")
    from paged_kv.eval.layer_costs import Costs

    costs = Costs(directory, task.tokens)
    by_layer = {layer: costs.of({layer: OTHERS}).divergence for layer in _shown(layers)}
    chosen = choose(by_layer, num_sensitive)
    results = {"this": costs.of(chosen)}
    for name in (NATIVE, SENSITIVE, OTHERS):
        results[name] = costs.of(dict.fromkeys(layers, name))
    write(args, directory, costs.num_layers, chosen, by_layer, results)
    _print(by_layer, chosen, results)


def read_layers(directory: Path, num_sensitive: int | None) -> tuple[list[int], int]:
    """(layers with pages, how many get int8). Raises ValueError."""
    config = decoder_config(directory)
    num_layers = config["num_hidden_layers"]
    layers = full_attention_layers(SimpleNamespace(**config), num_layers)
    if num_sensitive is None:
        return layers, -(-len(layers) // SHARE)
    if not 0 <= num_sensitive <= len(layers):
        raise ValueError(
            f"int8-layers must be an integer from 0 to {len(layers)}, the layers of this model "
            f"with full attention, not {num_sensitive}"
        )
    return layers, num_sensitive


def choose(costs: dict[int, float], num_sensitive: int) -> dict[int, str]:
    """The format of each layer, by what it costs in int4."""
    worst = sorted(costs, key=lambda layer: -costs[layer])[:num_sensitive]
    return {layer: SENSITIVE if layer in worst else OTHERS for layer in costs}


def write(
    args: argparse.Namespace,
    directory: Path,
    num_layers: int,
    chosen: dict[int, str],
    costs: dict[int, float],
    results: dict[str, Measured],
) -> None:
    """Writes the file."""
    measured = {
        "text": str(args.text),
        "tokens": args.tokens,
        "int4_divergence": [costs.get(layer) for layer in range(num_layers)],
        "results": {name: result._asdict() for name, result in results.items()},
    }
    content: dict[str, Any] = {
        "layers": [chosen.get(layer, NATIVE) for layer in range(num_layers)],
        "model": directory.name,
        "measured": measured,
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")


def _shown(layers: Sequence[int]) -> Iterator[int]:
    """Layer after layer, with a bar."""
    yield from tqdm(layers, desc="layers", unit="layer")


def _print(costs: dict[int, float], chosen: dict[int, str], results: dict[str, Measured]) -> None:
    print(f"{'layer':>5}  {'KL x 1000':>9}  format")
    for layer, cost in costs.items():
        print(f"{layer:>5}  {1000 * cost:>9.3f}  {chosen[layer]}")
    print(f"\n{'pages':<6}  {'nll':>8}  {'KL x 1000':>9}  {'bytes per token':>15}")
    for name, result in results.items():
        print(
            f"{name:<6}  {result.nll:>8.5f}  {1000 * result.divergence:>9.3f}  "
            f"{result.bytes_per_token:>15.1f}"
        )
