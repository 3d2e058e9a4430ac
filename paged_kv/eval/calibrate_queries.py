"""`paged-kv calibrate queries`: what a model's queries are like, for calibrated_attention.

Parts of a text of --context tokens, drawn by --seed, are read with a full cache; the queries before
RoPE of every layer and head are summed up (mean and covariance). The text matters little; it should
be of the kind that you serve. The file goes where vLLM and transformers find it by themselves, by
the model's identity, under the user's cache folder; --output writes it elsewhere, for the option
`statistics`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paged_kv import models
from paged_kv.bench.script import positive
from paged_kv.model_rules import full_attention_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv calibrate queries`."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8, like what you will run")
    add("--tokens", type=positive, default=16384, metavar="N", help="to read, default 16384")
    add("--context", type=positive, default=2048, metavar="N", help="tokens, default 2048")
    add("--seed", type=int, default=0, help="which parts of the text; default 0")
    add("--output", type=Path, metavar="FILE", help="the .safetensors file; default: the cache")
    add("--force", action="store_true", help="also if the model has a file in the cache")


def main(args: argparse.Namespace) -> None:
    """Reads, writes, prints where. Raises ValueError for what the user got wrong."""
    check(args)
    directory = models.resolve(args.model)
    from paged_kv.policies import query_files

    place = args.output or query_files.place_of(directory)
    if place is None:
        raise ValueError(f"model {directory}: its config.json or its weights cannot be read")
    if args.output is None and place.is_file() and not args.force:
        print(place)  # what was computed once is not computed again
        return
    contexts = read_contexts(directory, args)
    statistics = collect(directory, contexts)
    about = {"model": directory.name, "text": args.text.name}
    about["tokens"] = str(sum(map(len, contexts)))
    _write(place, statistics, about)
    print(place)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be. Raises ValueError."""
    if not args.text.is_file():
        raise ValueError(f"text {args.text}: no such file")
    if args.context > args.tokens:
        raise ValueError(f"context {args.context} must be at most tokens, {args.tokens}")
    output = args.output
    if output is not None and (output.suffix != ".safetensors" or not output.parent.is_dir()):
        raise ValueError(f"output {output} must be a .safetensors file in a directory that exists")


def read_contexts(directory: Path, args: argparse.Namespace) -> list[list[int]]:
    """Parts of the text that do not overlap, drawn by the seed. Raises ValueError: too short."""
    from paged_kv.hf.driver.loading import encode

    tokens = encode(directory, args.text.read_text(encoding="utf-8", errors="replace"))
    wanted, there = args.tokens // args.context, len(tokens) // args.context
    if there < wanted:
        raise ValueError(
            f"text {args.text} has {len(tokens)} tokens; tokens {args.tokens} in contexts of "
            f"{args.context} need {wanted * args.context}: take a longer text, or fewer tokens"
        )
    starts = sorted(random.Random(args.seed).sample(range(there), wanted))
    return [tokens[start * args.context :][: args.context] for start in starts]


def collect(directory: Path, contexts: list[list[int]]) -> Any:
    """Expected of all layers. Raises ValueError: the model is unsupported."""
    import numpy as np
    import torch

    from paged_kv.config import CompressionConfig
    from paged_kv.eval.reference.engine import ReferenceEngine
    from paged_kv.hf.driver.loading import load_model
    from paged_kv.kernels.operands import Expected
    from paged_kv.store.query_gathering import QueryGathering

    model = load_model(directory)
    config = model.config.get_text_config()
    full = full_attention_layers(config, config.num_hidden_layers)
    if not full:
        raise ValueError(f"model {directory} has no layer with full attention")
    num_tokens = sum(map(len, contexts))
    gathering = QueryGathering(num_tokens, num_keys=num_tokens)
    with tqdm(total=gathering.num_tokens, unit="tok") as bar:
        for context in contexts:
            ReferenceEngine(model, CompressionConfig(), gathering=gathering).process(context)
            bar.update(len(context))
    heads = np.arange(gathering.num_kv_heads)
    found = gathering.of(np.array(full), heads, torch.device("cpu"))
    # By index in the model; nobody asks for layers with a sliding window.
    every = [part.new_zeros(config.num_hidden_layers, *part.shape[1:]) for part in found]
    for zeros, part in zip(every, found, strict=True):
        zeros[full] = part
    return Expected(*every)


def _write(place: Path, statistics: Any, about: dict[str, str]) -> None:
    """All of it or nothing: another process may look for it."""
    from paged_kv.policies import query_files

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            query_files.save(Path(folder) / place.name, statistics, about)
            (Path(folder) / place.name).replace(place)
    except OSError as error:
        raise ValueError(f"output {place} cannot be written: {error}") from None
